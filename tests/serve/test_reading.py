"""Calls and thoughts in text that arrives in pieces of any size."""

import pytest

from swift.serve.reasoning import ReasoningReader, tags_of
from swift.serve.tools import CallArguments, CallBegins, ToolFormat, ToolReader

HERMES = ToolFormat('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")
CALL = '<tool_call>\n{"name": "snow", "arguments": {"city": "a}\\"b", "days": [1, {"x": 2}]}}\n</tool_call>'
ARGUMENTS = '{"city": "a}\\"b", "days": [1, {"x": 2}]}'


def read(text, size, form=HERMES):
    """(text, [(name, arguments)]) of what a reader gives for pieces of ``size`` characters."""
    reader = ToolReader(form, ["snow", "rain"])
    events = [event for at in range(0, len(text), size) for event in reader.add(text[at : at + size])] + reader.end()
    said = "".join(event for event in events if isinstance(event, str))
    calls = [[event.name, ""] for event in events if isinstance(event, CallBegins)]
    for event in events:
        if isinstance(event, CallArguments):
            calls[event.index][1] += event.text
    return said, [tuple(call) for call in calls]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("no call < here <tool", "no call < here <tool", []),
        (CALL, "", [("snow", ARGUMENTS)]),
        (f"I look.\n{CALL}", "I look.", [("snow", ARGUMENTS)]),
        (f"{CALL}\n{CALL.replace('snow', 'rain')}\n", "", [("snow", ARGUMENTS), ("rain", ARGUMENTS)]),
        ('<tool_call>{"name":"snow","arguments":{}}</tool_call> done', "done", [("snow", "{}")]),  # other spaces
        ("<tool_call> is a tag", "<tool_call> is a tag", []),
        (
            '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
            '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
            [],
        ),
        ('<tool_call>\n{"name": "snow", "arguments": {"a": ', "", [("snow", '{"a": ')]),  # cut by the length
    ],
)
def test_calls_are_told_from_text(text, said, calls, size):
    assert read(text, size) == (said, calls)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("", "<think>\nSnow?\n\nYes.\n</think>\n\nStay.", ("Snow?\n\nYes.", "Stay.")),
        ("x<think>\n", "Snow?\n</think>\n\nStay.", ("Snow?", "Stay.")),
        ("", "Stay. <think>", ("", "Stay. <think>")),
        ("", "<thin ice", ("", "<thin ice")),
        ("", "<think>cut </thi", ("cut </thi", "")),
        ("", "<think>\n\n</think>\n\nNo.", ("", "No.")),
    ],
)
def test_a_thought_is_told_from_the_answer(prompt, text, expected, size):
    reader = ReasoningReader(("<think>", "</think>"), prompt)
    pieces = [reader.add(text[at : at + size]) for at in range(0, len(text), size)] + [reader.end()]
    assert ("".join(thought for thought, _ in pieces), "".join(said for _, said in pieces)) == expected


def test_tags_are_those_that_the_template_knows():
    assert tags_of("{{ '<think>\\n' }}") == ("<think>", "</think>")
    assert tags_of("{{ message }}") is None
