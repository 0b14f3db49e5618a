"""Pairs in columns of their own: chosen and rejected beside a prompt (LLaMA-Factory, TRL), chosen_messages."""

from collections.abc import Set
from typing import Any

from swift.data.formats.base import Format
from swift.data.formats.common import build
from swift.data.formats.messages import read_messages
from swift.data.formats.query import FORMAT as QUERY
from swift.data.records import Message, Record
from swift.errors import DataError


def matches(columns: Set[str]) -> bool:
    return ("chosen" in columns and "rejected" in columns) or "chosen_messages" in columns


def convert(row: dict[str, Any]) -> Record:
    """The prompt and the chosen answer, and the prompt and the rejected one.

    An answer is a text, one message, a list of messages, or a whole conversation that repeats the prompt.
    """
    if "chosen_messages" in row:
        return build(row, read_messages(row.pop("chosen_messages")))
    chosen, rejected = _answer(row.pop("chosen"), "chosen"), _answer(row.pop("rejected"), "rejected")
    if chosen[0].role in ("system", "user"):
        row.pop("query", None)  # the conversations repeat it
        return build(row, chosen, rejected)
    prompt = _prompt(row), _prompt(row)
    for name in ("messages", "query", "instruction", "input", "history"):
        row.pop(name, None)
    return build(row, [*prompt[0], *chosen], [*prompt[1], *rejected])


def _answer(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [Message("assistant", value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is neither a text nor messages")
    return read_messages(value)


def _prompt(row: dict[str, Any]) -> list[Message]:
    if row.get("messages"):
        return read_messages(row["messages"])
    if not row.get("query") and not row.get("instruction"):
        raise DataError("chosen and rejected are answers, but the row has no prompt")
    names = ("query", "instruction", "input", "history")
    return QUERY.convert({name: row[name] for name in names if name in row}).messages


FORMAT = Format(matches, convert)
