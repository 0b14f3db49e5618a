"""What a row of training data is once its file format no longer matters, and what is wrong with a bad one."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from swift.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES = ("system", "user", "assistant", "tool")

# What a training objective wants of a row; see fault().
WANTS = ("sft", "pt", "preference", "kto", "grpo", "classify", "embedding", "reranker")


@dataclass(slots=True)
class Message:
    """One turn. ``content`` is text, or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image"}``.

    ``loss`` False keeps an assistant turn out of the loss, True puts it in whatever the strategy says;
    ``loss_scale`` multiplies the loss of its tokens. ``tool_calls`` has OpenAI's shape, with arguments as a dict.
    """

    role: str
    content: str | list[dict[str, Any]]
    loss: bool | None = None
    loss_scale: float | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The dict that a chat template reads."""
        made: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("tool_calls", "tool_call_id", "name"):
            value = getattr(self, key)
            if value is not None:
                made[key] = value
        return made

    def text(self) -> str:
        """The text of the content, without media."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content if part["type"] == "text")


@dataclass(slots=True)
class Record:
    """One row. ``rejected`` is the whole conversation that ends in the rejected answer, prompt included.

    ``images``, ``videos`` and ``audios`` are in the order in which the parts of the messages name them.
    ``extra`` holds the columns that are none of these; ``source`` is "file:line" or "file[index]".
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    audios: list[Any] = field(default_factory=list)
    objects: dict[str, Any] | None = None
    rejected: list[Message] | None = None
    positives: list[list[Message]] = field(default_factory=list)
    negatives: list[list[Message]] = field(default_factory=list)
    label: Any = None
    margin: float | None = None
    channel: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def has_media(self) -> bool:
        return bool(self.images or self.videos or self.audios)


@dataclass(slots=True)
class Rejected:
    """A row that is not trained on, and why."""

    source: str
    row: Any
    reason: str


def reasons(rejected: Iterable[Rejected]) -> list[tuple[int, str, str]]:
    """(count, reason, source) of each kind of reason, most frequent first, shown by its first row.

    Reasons that differ only in their numbers are of one kind.
    """
    kinds: dict[str, tuple[int, str, str]] = {}
    for item in rejected:
        kind = re.sub(r"\d+", "#", item.reason)
        count, reason, source = kinds.get(kind, (0, item.reason, item.source))
        kinds[kind] = (count + 1, reason, source)
    return sorted(kinds.values(), key=lambda entry: -entry[0])


def summary(rejected: Iterable[Rejected], count: int = 3) -> str:
    """The ``count`` most frequent reasons as one line."""
    kinds = reasons(rejected)
    listed = [f"{number} x {reason} ({source})" for number, reason, source in kinds[:count]]
    return "; ".join(listed) + (f"; {len(kinds) - count} other reasons" if len(kinds) > count else "")


def validate(record: Record, want: str) -> None:
    """Raise DataError, naming the row, if ``record`` cannot serve an objective that wants ``want`` (one of WANTS)."""
    reason = fault(record, want)
    if reason is not None:
        raise DataError(f"{record.source}: {reason}" if record.source else reason)


def fault(record: Record, want: str) -> str | None:
    """What is wrong with ``record`` for an objective that wants ``want``, or None if nothing is."""
    if want not in WANTS:
        raise DataError(f"unknown kind of row {want!r}", hint=f"known: {', '.join(WANTS)}")
    if not record.messages:
        return "the row has no messages"
    for conversation in (record.messages, record.rejected or [], *record.positives, *record.negatives):
        reason = _message_fault(conversation)
        if reason is not None:
            return reason
    return _FAULTS[want](record)


def _message_fault(messages: list[Message]) -> str | None:
    for index, message in enumerate(messages):
        where = f"message {index + 1} ({message.role})"
        if not _is_text(message):
            return f"{where} holds half of a surrogate pair, which is no text"
        if message.role not in ROLES:
            return f"message {index + 1} has the unknown role {message.role!r}"
        if message.role == "system" and index > 0:
            return f"{where} must be the first message"
        if message.role == "user" and not message.content:
            return f"{where} is empty"
        if message.role == "assistant" and not message.tool_calls and not message.text().strip():
            return f"{where} is empty"
        if message.role != "assistant" and (message.loss or message.loss_scale):
            return f"{where} asks for a loss, but only assistant messages are trained"
        if message.loss_scale is not None and message.loss_scale < 0:
            return f"{where} has the negative loss_scale {message.loss_scale}"
    return None


def _is_text(message: Message) -> bool:
    """Whether the strings of a message can be written as UTF-8: JSON may hold half of a surrogate pair."""
    try:
        message.text().encode()
        if message.tool_calls:
            json.dumps(message.tool_calls, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _sft_fault(record: Record) -> str | None:
    reason = _answer_fault(record.messages, "the row")
    if reason is not None:
        return reason
    if all(message.role == "assistant" for message in record.messages):
        return "the row has no user message (plain text is trained on by `swift pt`)"
    answers = [message for message in record.messages if message.role == "assistant"]
    if all(message.loss is False or message.loss_scale == 0 for message in answers):
        return "every assistant message has loss false, so nothing would be trained"
    return None


def _answer_fault(messages: list[Message], name: str) -> str | None:
    if not any(message.role == "assistant" for message in messages):
        return f"{name} has no assistant message"
    if messages[-1].role != "assistant":
        return f"the last message of {name} is from {messages[-1].role}, not from the assistant"
    return None


def _pt_fault(record: Record) -> str | None:
    if len(record.messages) != 1 or record.messages[0].role != "assistant":
        return f"pre-training wants one text (a `text` column, or one assistant message), the row has {len(record.messages)} messages"
    return None


def _preference_fault(record: Record) -> str | None:
    reason = _sft_fault(record)
    if reason is not None:
        return reason
    if not record.rejected:
        return "the row has no rejected answer"
    reason = _answer_fault(record.rejected, "the rejected conversation")
    if reason is not None:
        return reason
    if not any(message.role == "user" for message in record.rejected):
        return "the rejected conversation has no user message"
    chosen, rejected = ([message.for_template() for message in side] for side in (record.messages, record.rejected))
    if chosen == rejected:
        return "the rejected answer equals the chosen one"
    return _prompts_fault(chosen, rejected)


def _prompts_fault(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> str | None:
    """Both sides have to answer the same: all up to the last message of the user. What an agent did after it may differ."""
    ends = [max(at for at, message in enumerate(side) if message["role"] == "user") + 1 for side in (chosen, rejected)]
    if chosen[: ends[0]] == rejected[: ends[1]]:
        return None
    same = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(ends))
    return f"the chosen and the rejected conversation differ before the last question, from message {same + 1} on"


def _kto_fault(record: Record) -> str | None:
    reason = _sft_fault(record)
    if reason is not None:
        return reason
    if record.label is None:
        return "the row has no label (true for a desirable answer, false for an undesirable one)"
    if record.label not in (True, False):
        return f"label is {record.label!r}, not true or false"
    return None


def _grpo_fault(record: Record) -> str | None:
    if record.messages[-1].role not in ("user", "tool"):
        return f"the last message is from {record.messages[-1].role}, not from the user"
    return None


def _classify_fault(record: Record) -> str | None:
    if record.label is None:
        return "the row has no label"
    labels = record.label if isinstance(record.label, list) else [record.label]
    if not labels or not all(isinstance(label, int | float) for label in labels):
        return f"label is {record.label!r}, not a number or a list of numbers"
    return None


def _embedding_fault(record: Record) -> str | None:
    if record.label is not None and not record.positives:
        return "the row has a label but no positive_messages to compare with"
    return None


def _reranker_fault(record: Record) -> str | None:
    if not record.positives or not record.negatives:
        return "the row needs positive_messages and negative_messages"
    return None


_FAULTS = {
    "sft": _sft_fault,
    "pt": _pt_fault,
    "preference": _preference_fault,
    "kto": _kto_fault,
    "grpo": _grpo_fault,
    "classify": _classify_fault,
    "embedding": _embedding_fault,
    "reranker": _reranker_fault,
}
