"""The text of an answer while its tokens arrive."""

from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"  # what a decoder makes of half a character


class Writer:
    """Gives the text of tokens as soon as it is certain, up to the first of ``stop_words``.

    All pieces together are ``decode`` of all tokens, for decoders whose text of a token depends on the one before it only.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_words: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop_words = tuple(stop_words)
        self._ids: list[int] = []
        self._known = 0  # tokens whose text was given
        self._context = 0  # from here on tokens are decoded, so that the known ones show how the new ones join them
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token_ids: Sequence[int]) -> str:
        """What is certain after these tokens too."""
        if self.stopped_by is not None:
            return ""
        self._ids.extend(token_ids)
        known = self._decode(self._ids[self._context : self._known])
        text = self._decode(self._ids[self._context :])
        if text.endswith(UNKNOWN) or len(text) <= len(known):
            return ""
        self._context, self._known = self._known, len(self._ids)
        return self._certain(text[len(known) :])

    def end(self) -> str:
        """What was held back."""
        if self.stopped_by is not None:
            return ""
        known = self._decode(self._ids[self._context : self._known])
        text = self._decode(self._ids[self._context :])
        self._context = self._known = len(self._ids)
        certain = self._certain(text[len(known) :])
        rest, self._held = self._held, ""
        return certain + (rest if self.stopped_by is None else "")

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [(text.index(word), word) for word in self._stop_words if word in text]
        if found:
            place, self.stopped_by = min(found)
            self._held = ""
            return text[:place]
        keep = max((n for word in self._stop_words for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
