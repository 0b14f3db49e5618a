"""What a model thinks before it answers, told from the answer by the tags of its chat template."""

TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


def tags_of(template: str) -> tuple[str, str] | None:
    """The tags that ``template`` knows, or None."""
    return next(((begin, end) for begin, end in TAGS if begin in template or end in template), None)


class ReasoningReader:
    """Splits an answer into thought and text while it is written. ``prompt`` may have begun the thought."""

    def __init__(self, tags: tuple[str, str], prompt: str) -> None:
        self._begin, self._end = tags
        self._held = ""
        self._is_thinking = prompt.rstrip().endswith(self._begin)
        self._has_begun = self._is_thinking
        self._strips = self._is_thinking

    def add(self, text: str) -> tuple[str, str]:
        """(thought, text) that are certain after ``text`` too."""
        self._held += text
        if not self._has_begun:
            start = self._held.lstrip()
            if self._begin.startswith(start) and len(start) < len(self._begin):
                return "", ""
            self._has_begun = True
            if start.startswith(self._begin):
                self._is_thinking = self._strips = True
                self._held = start[len(self._begin) :]
        if self._strips:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return "", ""
            self._strips = False
        if not self._is_thinking:
            rest, self._held = self._held, ""
            return "", rest
        thought, found, rest = self._held.partition(self._end)
        if found:
            self._is_thinking = False
            self._strips = True
            self._held = ""
            return thought.rstrip("\n"), self.add(rest)[1]
        # A line break before the end is not part of the thought, so it waits as well.
        body = thought.rstrip("\n")
        tail = thought[len(body) :]
        keep = max((n for n in range(1, len(self._end)) if body.endswith(self._end[:n])), default=0)
        if keep:
            kept = body[len(body) - keep :] + tail
            body = body[: len(body) - keep]
            stripped = body.rstrip("\n")
            kept = body[len(stripped) :] + kept
            body = stripped
        else:
            kept = tail
        self._held = kept
        return body, ""

    def end(self) -> tuple[str, str]:
        """What was held back."""
        held, self._held = self._held, ""
        return (held, "") if self._is_thinking else ("", held)
