"""Lists of messages: OpenAI's, Anthropic's, ShareGPT's (from, value), ms-swift's (tool_call), human/assistant pairs."""

from collections.abc import Set
from typing import Any

from swift.data.formats.base import Format
from swift.data.formats.parts import Content, read_parts
from swift.data.formats.toolcalls import read_calls
from swift.data.records import Message, Record
from swift.errors import DataError

_ROLE_OF = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool_call": "tool_call", "function_call": "tool_call",
    "tool": "tool", "tool_response": "tool", "function_response": "tool", "function": "tool",
    "observation": "tool", "observations": "tool", "ipython": "tool",
}  # fmt: skip


def matches(columns: Set[str]) -> bool:
    return "messages" in columns


def convert(row: dict[str, Any]) -> Record:
    from swift.data.formats.common import build

    return build(row, read_messages(row.pop("messages")))


def read_messages(value: Any) -> list[Message]:
    """Messages with our roles; DataError says which message cannot be read.

    A tool call message becomes ``tool_calls`` of an assistant message; calls that follow each other, or the text of an
    assistant, are one message, as chat templates want them.
    """
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not isinstance(value, list):
        raise DataError(f"messages is a {type(value).__name__}, not a list")
    messages: list[Message] = []
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"message {index + 1} is a {type(item).__name__}, not an object")
        if "role" not in item and "from" not in item and "human" in item:
            messages += _pair(item, index)
            continue
        for message in _read_one(item, index):
            _append(messages, message)
    return messages


def _pair(item: dict[str, Any], index: int) -> list[Message]:
    """``{"human": question, "assistant": answer}``, the answer being optional."""
    question, answer = item["human"], item.get("assistant")
    if not isinstance(question, str) or not isinstance(answer, str | None):
        raise DataError(f"conversation[{index}] has a human or assistant side that is not a text")
    return [Message("user", question), *([] if answer is None else [Message("assistant", answer)])]


def _read_one(item: dict[str, Any], index: int) -> list[Message]:
    name = item.get("role", item.get("from"))
    if not isinstance(name, str):
        raise DataError(f"message {index + 1} has no role")
    role = _ROLE_OF.get(name.lower().replace("-", "_"))
    if role is None:
        raise DataError(f"message {index + 1} has the unknown role {name!r}")
    raw = item["content"] if "content" in item else item.get("value", item.get("text"))
    common = _flags(item, index)
    if role == "tool_call":
        return [Message("assistant", "", tool_calls=read_calls(raw, f"message {index + 1} ({name})"), **common)]
    content = read_parts(raw, f"message {index + 1} ({name})")
    messages = _tool_results(content)
    calls = _calls(item, content, index)
    if content.value or calls or not messages:
        message = Message(role, content.value, tool_calls=calls, **common)
        if role == "tool":
            message.tool_call_id, message.name = item.get("tool_call_id"), item.get("name")
        messages.append(message)
    return messages


def _calls(item: dict[str, Any], content: Content, index: int) -> list[dict[str, Any]] | None:
    calls = item.get("tool_calls") or content.calls
    if not calls and item.get("function_call"):
        calls = item["function_call"]
    return read_calls(calls, f"message {index + 1}: tool_calls") if calls else None


def _tool_results(content: Content) -> list[Message]:
    return [Message("tool", text, tool_call_id=call_id) for call_id, text in content.results]


def _flags(item: dict[str, Any], index: int) -> dict[str, Any]:
    """``loss`` and ``loss_scale`` (LLaMA-Factory: ``loss_weight``) of a message."""
    loss, scale = item.get("loss"), item.get("loss_scale", item.get("loss_weight"))
    if loss in (0, 1):
        loss = bool(loss)
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"message {index + 1} has loss {loss!r}, not true or false")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise DataError(f"message {index + 1} has loss_scale {scale!r}, not a number")
    return {"loss": loss, "loss_scale": None if scale is None else float(scale)}


def _append(messages: list[Message], message: Message) -> None:
    """Add ``message``, joining a tool call to the assistant message before it."""
    last = messages[-1] if messages else None
    is_call = message.role == "assistant" and message.tool_calls is not None and not message.content
    if last is None or last.role != "assistant" or not is_call or message.tool_calls is None:
        messages.append(message)
        return
    if (last.loss, last.loss_scale) != (message.loss, message.loss_scale):
        raise DataError("a tool call and the assistant message it belongs to have different loss or loss_scale")
    last.tool_calls = [*(last.tool_calls or []), *message.tool_calls]


FORMAT = Format(matches, convert)
