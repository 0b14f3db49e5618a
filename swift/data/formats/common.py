"""What all layouts share: system prompt, rejected answer, tools, media, labels, and the columns that are left over."""

from typing import Any

from swift.data.formats.columns import parse_text
from swift.data.formats.messages import read_messages
from swift.data.formats.toolcalls import read_tools
from swift.data.media import place_media
from swift.data.records import Message, Record
from swift.errors import DataError


def build(row: dict[str, Any], messages: list[Message], rejected: list[Message] | None = None) -> Record:
    """A Record of ``messages`` (chosen ones, if ``rejected`` is given) and the remaining columns of ``row``.

    Takes the columns it uses out of ``row``; what is left becomes ``extra``.
    """
    system = row.pop("system", None)
    conversations = [messages, rejected or _rejected(row, messages)]
    if system is not None and system != "":
        text = read_messages([{"role": "system", "content": system}])[0].content
        for conversation in conversations:
            if conversation and conversation[0].role != "system":
                conversation.insert(0, Message("system", text))
    record = Record(
        messages=messages,
        rejected=conversations[1],
        tools=read_tools(row.pop("tools", None)),
        positives=_many(row, "positive_messages"),
        negatives=_many(row, "negative_messages"),
        objects=_mapping(row, "objects"),
        label=_label(row.pop("label", None)),
        margin=_number(row, "margin"),
        channel=_optional_text(row, "channel"),
        chat_template_kwargs=_mapping(row, "chat_template_kwargs"),
    )
    place_media(record, row)
    record.extra = row
    return record


def require_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}, not a text")
    return value


def prompt_of(messages: list[Message]) -> list[Message]:
    """The messages up to the last one from the user or a tool: what both answers of a pair answer."""
    last = max((index for index, message in enumerate(messages) if message.role in ("user", "tool")), default=-1)
    return messages[: last + 1]


def _rejected(row: dict[str, Any], messages: list[Message]) -> list[Message] | None:
    """The conversation with the rejected answer, of ``rejected_messages`` or ``rejected_response``."""
    whole = row.pop("rejected_messages", None)
    if whole:
        return read_messages(whole)
    answer = row.pop("rejected_response", None)
    if answer is None or answer == "" or answer == []:
        return None
    if isinstance(answer, str) and answer.lstrip().startswith("[{"):
        answer = parse_text(answer, "rejected_response")
    if isinstance(answer, list) and all(isinstance(item, dict) for item in answer):
        read = read_messages(answer)
        return read if read and read[0].role in ("system", "user") else [*_copies(prompt_of(messages)), *read]
    return [*_copies(prompt_of(messages)), Message("assistant", require_text(answer, "rejected_response"))]


def _copies(messages: list[Message]) -> list[Message]:
    import copy

    return [copy.copy(message) for message in messages]


def _many(row: dict[str, Any], name: str) -> list[list[Message]]:
    """A list of conversations; one conversation stands for a list of one."""
    value = row.pop(name, None)
    if not value:
        return []
    if not isinstance(value, list):
        raise DataError(f"{name} is a {type(value).__name__}, not a list of conversations")
    if isinstance(value[0], dict):
        value = [value]
    return [read_messages(conversation) for conversation in value]


def _mapping(row: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = row.pop(name, None)
    if value is None or value == "" or value == {}:
        return None
    if not isinstance(value, dict):
        raise DataError(f"{name} is a {type(value).__name__}, not an object")
    return value


def _optional_text(row: dict[str, Any], name: str) -> str | None:
    value = row.pop(name, None)
    return None if value is None or value == "" else str(value)


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.pop(name, None)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{name} is {value!r}, not a number") from None


def _label(value: Any) -> Any:
    """A label as a number, a bool or a list of them; texts as csv files have them are read."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text == "":
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith("["):
        return parse_text(text, "label")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return value
