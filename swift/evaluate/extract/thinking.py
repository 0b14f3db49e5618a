"""Thinking aloud before an answer, which is not read for the answer."""

import re

_WHOLE = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_END = re.compile(r".*</(?:think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(r"<(?:think|thinking|thought|reasoning)>.*", re.DOTALL | re.IGNORECASE)


def without_thinking(text: str) -> tuple[str, str | None]:
    """``text`` without its thinking, and what is to be said of that: None, or that the thinking did not end.

    A chat template may open the thinking in the prompt, so that the answer holds its end alone.
    """
    rest = _END.sub("", _WHOLE.sub("", text))
    if (begin := _OPEN.search(rest)) is not None:
        return rest[: begin.start()].strip(), "the thinking has no end"
    return (rest.strip() if rest != text else text), None
