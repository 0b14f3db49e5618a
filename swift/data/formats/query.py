"""Questions and answers: query/response/history/system, alpaca's instruction/input/output and their aliases."""

from collections.abc import Set
from typing import Any

from swift.data.formats.base import Format
from swift.data.formats.common import build, require_text
from swift.data.formats.messages import read_messages
from swift.data.records import Message, Record
from swift.errors import DataError


def matches(columns: Set[str]) -> bool:
    return "query" in columns or "instruction" in columns


def convert(row: dict[str, Any]) -> Record:
    """History, then the question, then the answer if there is one (a GRPO row has none)."""
    messages = _history(row.pop("history", None))
    query = _query(row)
    messages += read_messages(query) if isinstance(query, list) else [Message("user", query)]
    response = row.pop("response", None)
    if isinstance(response, list) and response and isinstance(response[0], dict):
        messages += read_messages(response)
    elif response is not None and response != "" and response != []:
        messages.append(Message("assistant", _answer(response)))
    return build(row, messages)


def _query(row: dict[str, Any]) -> Any:
    """The question: ``instruction`` and ``input`` joined by a newline if there is no ``query``."""
    query = row.pop("query", None)
    if query is not None and query != "":
        return query if isinstance(query, list) else require_text(query, "query")
    instruction = require_text(row.pop("instruction"), "instruction")
    text = row.pop("input", None)
    if text is None or text == "":
        return instruction
    return f"{instruction}\n{require_text(text, 'input')}"


def _answer(response: Any) -> str:
    if isinstance(response, list) and len(response) == 1:
        response = response[0]
    if isinstance(response, bool) or not isinstance(response, str | int | float):
        raise DataError(f"response is a {type(response).__name__}, not a text")
    return str(response)


def _history(history: Any) -> list[Message]:
    if not history:
        return []
    if not isinstance(history, list):
        raise DataError(f"history is a {type(history).__name__}, not a list of [question, answer] pairs")
    messages = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"history[{index}] is not a [question, answer] pair")
        messages.append(Message("user", require_text(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", require_text(pair[1], f"history[{index}][1]")))
    return messages


FORMAT = Format(matches, convert)
