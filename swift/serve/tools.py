"""Tool calls in the text of a model: their form is read off its chat template, so no model is known by name."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.data.template import ChatTemplate
from swift.engine.base import Grammar
from swift.errors import DataError

NAME, KEY, VALUE = "probed_function_name", "probed_key", "probed value"


@dataclass(frozen=True)
class ToolFormat:
    """A call is ``begin``, the name, ``middle``, the arguments as JSON, ``end``; ``between`` stands between two calls."""

    begin: str
    middle: str
    end: str
    between: str

    @property
    def trigger(self) -> str:
        """What tells a call from text: the first word of ``begin``."""
        return self.begin.split()[0]

    def grammar(self, tools: Sequence[dict[str, Any]], *, several: bool) -> Grammar:
        """Answers that are calls of ``tools`` with arguments as their schemas say, and nothing else."""
        calls = []
        for number, tool in enumerate(tools):
            schema = tool.get("parameters") or {"type": "object"}
            head = json.dumps(f"{self.begin}{tool['name']}{self.middle}")
            calls.append(f"call_{number}: {head} args_{number} {json.dumps(self.end)}\nargs_{number}: %json {json.dumps(schema)}")
        alternatives = " | ".join(f"call_{number}" for number in range(len(tools)))
        more = f" ({json.dumps(self.between)} call)*" if several else ""
        if several and not self.between:
            more = " call*"
        return Grammar("lark", "\n".join([f"start: call{more}", f"call: {alternatives}", *calls]))


def tool_format(template: ChatTemplate) -> ToolFormat:
    """How ``template`` writes calls. Raises DataError if it does so in a form that is not understood."""
    question: dict[str, Any] = {"role": "user", "content": "q"}
    tools = [{"type": "function", "function": {"name": NAME, "description": "", "parameters": {"type": "object", "properties": {}}}}]

    def answered(count: int) -> str:
        calls = [{"id": f"call_{n:05d}", "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}} for n in range(count)]
        messages: list[dict[str, Any]] = [question, {"role": "assistant", "content": "", "tool_calls": calls}]
        before = template.text(messages[:1], tools, prompt=True)
        whole = template.text(messages, tools)
        if not whole.startswith(before):
            before = template.text(messages[:1], tools)
        return whole[len(before) :] if whole.startswith(before) else ""

    one, two = _cut_ends(answered(1), template), _cut_ends(answered(2), template)
    arguments = next((text for text in _spellings() if text in one), None)
    if one.count(NAME) != 1 or arguments is None or one.index(arguments) < one.index(NAME):
        raise DataError("the model's chat template writes tool calls in a form that is not understood", hint="ask without tools")
    begin, rest = one.split(NAME)
    middle, end = rest.split(arguments)
    begin, end = begin.lstrip(), end.rstrip()
    if not begin:
        raise DataError("the model's chat template does not mark tool calls", hint="ask without tools")
    parts = two.split(f"{begin}{NAME}{middle}{arguments}{end}")
    return ToolFormat(begin, middle, end, parts[1] if len(parts) == 3 else "\n")


def _spellings() -> list[str]:
    return [json.dumps({KEY: VALUE}), json.dumps({KEY: VALUE}, separators=(",", ":")), json.dumps({KEY: VALUE}, indent=2)]


def _cut_ends(text: str, template: ChatTemplate) -> str:
    """The text up to the special token that ends a turn."""
    for _ in range(len(template.ends)):
        stripped = text.rstrip()
        ended = next((end for end in template.ends if end and stripped.endswith(end)), None)
        if ended is None:
            break
        text = stripped[: -len(ended)]
    return text


@dataclass(frozen=True)
class CallBegins:
    """A call of ``name``, the ``index``-th of the answer."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = str | CallBegins | CallArguments


class ToolReader:
    """Splits an answer into text and calls while it is written.

    What looks like a call and is none is given as the text that it is.
    """

    def __init__(self, form: ToolFormat, names: Sequence[str]) -> None:
        self._form = form
        self._head = re.compile(rf"{_loosely(form.begin)}({'|'.join(map(re.escape, names))}){_loosely(form.middle)}\s*")
        self._held = ""
        self._scanner: _JsonScanner | None = None
        self._ending = False
        self.num_calls = 0

    def add(self, text: str) -> list[Event]:
        """What is certain after ``text`` too."""
        self._held += text
        events: list[Event] = []
        while self._step(events, at_end=False):
            pass
        return events

    def end(self) -> list[Event]:
        """What was held back."""
        events: list[Event] = []
        while self._step(events, at_end=True):
            pass
        if self._held and self._scanner is None and not self._ending:
            events.append(self._held)
        self._held = ""
        return events

    def _step(self, events: list[Event], *, at_end: bool) -> bool:
        """Take something from what is held; whether there may be more to take."""
        if self._scanner is not None:
            return self._take_arguments(events)
        if self._ending:
            return self._take_end(at_end)
        return self._take_text(events, at_end)

    def _take_arguments(self, events: list[Event]) -> bool:
        assert self._scanner is not None
        length = self._scanner.scan(self._held)
        if length:
            events.append(CallArguments(self.num_calls - 1, self._held[:length]))
        self._held = self._held[length:]
        if self._scanner.is_complete:
            self._scanner, self._ending = None, True
            return True
        return False

    def _take_end(self, at_end: bool) -> bool:
        """What stands behind the arguments, as far as it is what the form wants."""
        wanted = "".join(self._form.end.split())
        place = 0
        for at, letter in enumerate(self._held):
            if place == len(wanted):
                self._held, self._ending = self._held[at:].lstrip(), False
                return bool(self._held)
            if letter.isspace():
                continue
            if letter != wanted[place]:
                self._held, self._ending = self._held[at:], False
                return True
            place += 1
        if place == len(wanted):
            self._held, self._ending = "", False
        elif at_end:
            self._held = ""
        return False

    def _take_text(self, events: list[Event], at_end: bool) -> bool:
        trigger = self._form.trigger
        place = self._held.find(trigger)
        if place < 0:
            text, self._held = self._held, ""
            if not at_end:  # the trigger may have begun, and white space before it is no part of the text
                keep = max((n for n in range(1, len(trigger)) if text.endswith(trigger[:n])), default=0)
                certain = text[: len(text) - keep].rstrip()
                text, self._held = certain, text[len(certain) :]
            if self.num_calls:
                text = text.strip()  # what stands between calls
            if text:
                events.append(text)
            return False
        found = self._head.match(self._held, place)
        if found is not None and found.end() < len(self._held):
            before = self._held[:place].rstrip() if self.num_calls == 0 else self._held[:place].strip()
            if before:
                events.append(before)
            events.append(CallBegins(self.num_calls, found[1]))
            self.num_calls += 1
            self._held, self._scanner = self._held[found.end() :], _JsonScanner()
            return True
        if not at_end and len(self._held) - place < len(self._form.begin) + len(self._form.middle) + 128:
            return False  # the rest of the head may follow
        end = place + len(trigger)
        events.append(self._held[:end])
        self._held = self._held[end:]
        return True


class _JsonScanner:
    """Finds where a JSON object or list that is read piece by piece ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = False
        self._escaped = False
        self.is_complete = False

    def scan(self, text: str) -> int:
        """How many characters of ``text`` belong to the value."""
        for at, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped = letter == "\\"
                self._in_text = letter != '"'
            elif letter == '"':
                self._in_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_complete = True
                    return at + 1
        return len(text)


def _loosely(literal: str) -> str:
    """A regex for ``literal`` with any white space between its words and signs."""
    return r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", literal)))
