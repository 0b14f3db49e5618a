"""A chat template of Jinja as one in Go's syntax, which Ollama reads.

Found by rendering: the pieces of text around the messages of a few conversations. If these pieces give back what the chat
template gives for other conversations, they are the template; if not, there is none in this form.
"""

from collections.abc import Callable
from dataclasses import dataclass

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # messages, and whether an answer begins at the end

_WORDS = {"system": "Zq0systemqZ", "user": "Zq{}userqZ", "assistant": "Zq{}answerqZ"}


@dataclass(frozen=True)
class Pieces:
    """What stands around contents. ``opening`` is before a first user message that no system message precedes."""

    system: tuple[str, str] | None  # before it, and between it and the user's message; None: templates that refuse one
    opening: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str  # after the last message, where the answer begins

    def render(self, messages: list[Message]) -> str:
        """The text of ``messages``, at the end of which an answer begins."""
        text = ""
        for place, message in enumerate(messages):
            content, role = message["content"], message["role"]
            if role == "system":
                assert self.system is not None
                text += self.system[0] + content
            elif role == "user":
                follows_system = place == 1 and messages[0]["role"] == "system" and self.system is not None
                before = self.opening if place == 0 else self.system[1] if follows_system and self.system else self.user[0]
                text += before + content + self.user[1]
            else:
                text += self.assistant[0] + content + self.assistant[1]
        return text + self.prompt

    @property
    def default_system(self) -> str | None:
        """The system message that the template writes where a conversation has none."""
        if self.system is None or not self.opening.startswith(self.system[0]) or not self.opening.endswith(self.system[1]):
            return None
        return self.opening[len(self.system[0]) : len(self.opening) - len(self.system[1])] or None

    def go(self) -> str:
        """The template in Go's syntax (text/template) over .Messages, of which a system message is the first."""
        first, last = self.user[0], _quoted
        before, between, opening = "", "", self.opening
        if self.system is not None:
            before, between = self.system
        is_regular = (self.system is None or between.endswith(first)) and opening.endswith(first)
        text = ""
        if is_regular:
            head, between = opening[: len(opening) - len(first)], between[: len(between) - len(first)] if self.system else ""
            if head and self.default_system is None:
                text += f"{{{{ if not .System }}}}{last(head)}{{{{ end }}}}" if self.system else last(head)
            user = last(first)
        else:
            user = f"{{{{ if eq $place 0 }}}}{last(opening)}"
            if self.system is not None:
                user += f"{{{{ else if and $.System (eq $place 1) }}}}{last(between)}"
            user += f"{{{{ else }}}}{last(first)}{{{{ end }}}}"
        system = f'{{{{ if eq .Role "system" }}}}{last(before)}{{{{ .Content }}}}{last(between) if is_regular else ""}{{{{ else '
        text += "{{ range $place, $message := .Messages }}" + (system if self.system is not None else "{{ ")
        text += f'if eq .Role "user" }}}}{user}{{{{ .Content }}}}{last(self.user[1])}'
        text += f'{{{{ else if eq .Role "assistant" }}}}{last(self.assistant[0])}{{{{ .Content }}}}{last(self.assistant[1])}{{{{ end }}}}'
        return text + "{{ end }}" + last(self.prompt)


def find_pieces(render: Render, refusals: tuple[type[Exception], ...] = ()) -> Pieces | None:
    """The pieces of the template that ``render`` applies; None if it has more to it. ``refusals`` are errors of templates."""
    try:
        pieces = _pieces(render, refusals)
        return pieces if pieces is not None and all(pieces.render(told) == render(told, True) for told in _further(pieces)) else None
    except refusals:
        return None


def _pieces(render: Render, refusals: tuple[type[Exception], ...]) -> Pieces | None:
    first, answer, second = _message("user", 1), _message("assistant", 1), _message("user", 2)
    asked = _around(render([first], False), [first])
    begun = _around(render([first], True), [first])
    answered = _around(render([first, answer], False), [first, answer])
    again = _around(render([first, answer, second], True), [first, answer, second])
    if not asked or not begun or not answered or not again:
        return None
    after_user, after_answer = asked[1], answered[2]
    if not (begun[1].startswith(after_user) and again[1].startswith(after_user) and again[2].startswith(after_answer)):
        return None
    system = None
    told = _message("system", 0)
    try:
        found = _around(render([told, first], True), [told, first])
        system = None if found is None else (found[0], found[1])
    except refusals:
        pass
    return Pieces(
        system,
        begun[0],
        (again[2][len(after_answer) :], after_user),
        (again[1][len(after_user) :], after_answer),
        begun[1][len(after_user) :],
    )


def _message(role: str, number: int) -> Message:
    return {"role": role, "content": _WORDS[role].format(number)}


def _around(text: str, messages: list[Message]) -> list[str] | None:
    """The pieces of ``text`` before, between and after the contents; None if one is not there exactly once, in this order."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _further(pieces: Pieces) -> list[list[Message]]:
    """Conversations that must come out alike."""
    contents = ['Is it "cold"?\nYes: -3 \u00b0C.', "\u5357\u4eac\u4e0b\u96ea\u4e86\u5417\uff1f", "a {b} c", "ok", "1 + 1 = 2"]
    roles = ("user", "assistant")
    plain = [[{"role": roles[n % 2], "content": contents[n]} for n in range(length)] for length in (1, 3, 5)]
    if pieces.system is None:
        return plain
    return plain + [[{"role": "system", "content": "Be brief."}, *conversation] for conversation in plain]


def _quoted(text: str) -> str:
    """``text`` as it stands in a template of Go."""
    return text.replace("{{", '{{ "{{" }}')
