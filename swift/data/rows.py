"""From a row of a file to a checked record, and the count of what was seen: the same for data read whole and streamed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift import console
from swift.data.formats import to_record
from swift.data.formats.columns import ALIASES
from swift.data.identity import Identity, has_placeholder
from swift.data.media import beside
from swift.data.records import Message, Record, Rejected, fault, summary
from swift.errors import DataError, near

KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the options say about every row."""

    want: str = "sft"
    columns: dict[str, str] = field(default_factory=dict)
    strict: bool = False
    system: str | None = None
    identity: Identity = field(default_factory=Identity)
    has_keys: bool = False
    """Whether ``key`` is wanted of each record."""


@dataclass
class Tally:
    """What was seen of the rows, in the order of the files."""

    num_rows: int = 0
    num_rejected: int = 0
    num_placeholders: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    """The columns of the rows, if --columns names any."""
    unused: str | None = None
    """Of the first record: the columns that lost against another of the same meaning."""
    num_pairs: int = 0
    """Rows whose rejected answer nothing is made of."""

    def add(self, other: "Tally") -> None:
        self.num_rows += other.num_rows
        self.num_rejected += other.num_rejected
        self.num_placeholders += other.num_placeholders
        self.num_pairs += other.num_pairs
        self.columns.update(other.columns)


def check_row(source: str, row: Any, rules: Rules, tally: Tally) -> tuple[Record, bytes | None] | Rejected:
    """The record of a row and its key, or why it is none. With ``strict`` DataError instead of the latter."""
    tally.num_rows += 1
    if rules.columns and isinstance(row, dict):
        tally.columns.update(dict.fromkeys(map(str, row)))
    key = None
    try:
        record = to_record(row, columns=rules.columns, source=source)
        if rules.has_keys:
            key = _key(record)
        _complete(record, row, rules, tally)
        reason = fault(record, rules.want)
    except DataError as error:
        reason = error.message
    if reason is None:
        if tally.num_rows == tally.num_rejected + 1:
            tally.unused = _unused(record, row, rules)
        tally.num_pairs += record.rejected is not None and rules.want == "sft"
        return record, key
    if rules.strict:
        raise DataError(f"{source}: {reason}", hint="leave out --strict to go on without such rows")
    tally.num_rejected += 1
    return Rejected(source, row, reason)


def _key(record: Record) -> bytes:
    """Equal for records with the same conversations."""
    sides = [record.messages, record.rejected or [], *record.positives]
    text = json.dumps([[message.for_template() for message in side] for side in sides], default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def _unused(record: Record, row: dict[str, Any], rules: Rules) -> str | None:
    meanings = {*ALIASES["query"], *ALIASES["response"]}
    unused = [column for column in record.extra if column in meanings]
    has_messages = any(column in row for column in ("messages", *ALIASES["messages"]))
    return ", ".join(unused) if unused and rules.want != "grpo" and not has_messages else None


def tell_unused(tally: Tally, name: str) -> None:
    if tally.unused:
        console.notice(f"{name}: {tally.unused} not used, another column has the same meaning (choose with --columns)")


def _complete(record: Record, row: Any, rules: Rules, tally: Tally) -> None:
    """Apply what the options say about every record."""
    conversations = [record.messages, *([record.rejected] if record.rejected else [])]
    if rules.want == "grpo" and record.messages[-1:] and record.messages[-1].role == "assistant":
        record.extra["response"] = record.messages.pop().text()
        record.extra.update({name: row[name] for name in ALIASES["response"] if name in row})
    if rules.want == "kto" and record.label in (0, 1):
        record.label = bool(record.label)
    if rules.want in ("classify", "embedding", "reranker") and len(record.messages) == 1:
        record.messages[0].role = "user"
    for conversation in conversations:
        if rules.system and conversation and conversation[0].role != "system" and rules.want != "pt":
            conversation.insert(0, Message("system", rules.system))
        if rules.identity.is_given:
            rules.identity.fill(conversation)
        elif has_placeholder(conversation):
            tally.num_placeholders += 1
    if record.has_media():
        folder = Path(record.source.rpartition("[")[0] or record.source.rpartition(":")[0]).parent
        for files in (record.images, record.videos, record.audios):
            files[:] = [beside(folder, path) for path in files]


def check_columns(tally: Tally, rules: Rules) -> None:
    """DataError if --columns names a column that no row has."""
    unseen = [name for name in rules.columns if name not in tally.columns]
    if unseen:
        match = near(unseen[0], tally.columns)
        raise DataError(
            f"--columns names the column {unseen[0]!r}, which no row has",
            hint=f"did you mean {match!r}?" if match else f"columns: {', '.join(tally.columns)}",
        )


def tell_placeholders(tally: Tally) -> None:
    if tally.num_placeholders:
        console.warn(f"{tally.num_placeholders} rows hold {{{{NAME}}}} or {{{{AUTHOR}}}}: give --model_name and --model_author")


def tell_pairs(tally: Tally) -> None:
    if tally.num_pairs:
        console.notice(f"{tally.num_pairs} rows have a rejected answer, which is not used: swift rlhf --rlhf_type dpo trains on both")


def check_rejected(tally: Tally, rejected: Sequence[Rejected], max_rejected: float) -> str | None:
    """DataError if too many rows are rejected; else what to say of them, if there are any."""
    if not tally.num_rejected:
        return None
    facts = f"{tally.num_rejected} of {tally.num_rows} rows are rejected"
    if tally.num_rejected > max_rejected * tally.num_rows:
        raise DataError(f"{facts}, more than {max_rejected:.0%}: {summary(rejected)}")
    return f"{facts}: {summary(rejected, 1)}"
