"""Data sets to checked records: read, convert, check, sample, split. Nothing here needs a model."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift import console
from swift.data import sources
from swift.data.formats import to_record
from swift.data.formats.columns import ALIASES
from swift.data.identity import Identity, has_placeholder
from swift.data.media import beside
from swift.data.records import WANTS, Message, Record, Rejected, fault, summary
from swift.errors import ConfigError, DataError, near
from swift.files import new_file


@dataclass
class Loaded:
    """Checked records, and the rows that are none."""

    train: list[Record]
    validation: list[Record] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def load_records(
    datasets: Sequence[str],
    *,
    want: str = "sft",
    columns: Mapping[str, str] | None = None,
    strict: bool = False,
    max_rejected: float = 0.1,
    data_seed: int = 42,
    shuffle: bool = True,
    shuffle_validation: bool = False,
    model_name: str | Sequence[str] | None = None,
    model_author: str | Sequence[str] | None = None,
    system: str | None = None,
    split_ratio: float = 0.0,
    val_datasets: Sequence[str] = (),
    use_hf: bool | None = None,
    hub_token: str | None = None,
    offline: bool = False,
) -> Loaded:
    """Read ``datasets`` (see ``sources.parse_spec``) into records that serve an objective wanting ``want``.

    ``name#n`` takes n rows: a seeded sample (the first n without ``shuffle``); more than there are repeats them all,
    n // rows times, and samples the rest. ``split_ratio`` sends that share of the distinct rows, at least one, to
    validation before anything repeats; equal rows stay together. ``columns`` maps column names to known ones;
    ``system`` is for rows without a system prompt; ``model_name`` and ``model_author`` (or [Chinese, English]) replace
    {{NAME}} and {{AUTHOR}}. For "grpo" a final answer moves to ``extra["response"]``. ``use_hf``, ``hub_token`` and
    ``offline`` are for ids of hubs.

    Raises DataError if a file cannot be read, if nothing is left, if more than the share ``max_rejected`` of the rows
    is rejected, or, with ``strict``, if one is.
    """
    if not datasets:
        raise ConfigError("no data set is given", hint="give --dataset, for instance --dataset snow-alerts")
    if want not in WANTS:
        raise ConfigError(f"unknown kind of row {want!r}", hint=f"known: {', '.join(WANTS)}")
    if val_datasets and split_ratio:
        raise ConfigError("val_dataset and split_dataset_ratio are both given", hint="set --split_dataset_ratio 0")
    if not 0 <= split_ratio < 1:
        raise ConfigError(f"split_dataset_ratio is {split_ratio}", hint="give a share of at least 0 and less than 1")
    hub_options = {"use_hf": use_hf, "token": hub_token, "offline": offline}
    identity = Identity.of(model_name, model_author)
    reader = _Reader(want, dict(columns or {}), strict, system, identity, hub_options, has_keys=split_ratio > 0)
    randomness = random.Random(data_seed)
    train: list[Record] = []
    validation: list[Record] = []
    for name in datasets:
        spec = sources.parse_spec(name)
        records = reader.read(spec)
        size = len(records) if spec.num_samples is None else spec.num_samples
        taken = _sample(records, size, randomness) if shuffle else records[:size]
        kept, held = split(taken, split_ratio, randomness, reader.keys)
        train += _repeat(kept, size - len(held), shuffle, randomness)
        validation += held
    for name in val_datasets:
        spec = sources.parse_spec(name)
        records = reader.read(spec)
        size = len(records) if spec.num_samples is None else spec.num_samples
        validation += _repeat(records, size, shuffle_validation, randomness)
    reader.finish(max_rejected)
    if not train:
        raise DataError("no row is left to train on", hint=summary(reader.rejected) or None)
    if val_datasets and not validation:
        raise DataError("no row is left in the validation set", hint=summary(reader.rejected) or None)
    if shuffle:
        randomness.shuffle(train)
    if shuffle_validation:
        randomness.shuffle(validation)
    return Loaded(train, validation, reader.rejected)


def split(records: list[Record], ratio: float, randomness: random.Random, keys: Mapping[str, bytes]) -> tuple[list[Record], list[Record]]:
    """(train, validation): validation gets ``ratio`` of the records, at least one; those of one key stay together.

    ``keys`` is by source. Both sides keep the order of ``records``. Raises DataError if train would be empty.
    """
    if ratio == 0 or not records:
        return records, []
    groups: dict[bytes, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(keys[record.source], []).append(index)
    wanted = max(1, int(len(records) * ratio))
    held: set[int] = set()
    order = list(groups.values())
    randomness.shuffle(order)
    for members in order:
        if len(held) + len(members) <= wanted or not held:
            held.update(members)
    if len(held) == len(records):
        raise DataError(
            f"a split of {ratio} leaves nothing to train on: {len(records)} rows, {len(groups)} distinct",
            hint="add rows, or set --split_dataset_ratio 0",
        )
    train = [record for index, record in enumerate(records) if index not in held]
    return train, [record for index, record in enumerate(records) if index in held]


def write_rejected(path: str | Path, rejected: Iterable[Rejected]) -> None:
    """Write one JSON object a line: source, reason, row."""
    with new_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for item in rejected:
            line = {"source": item.source, "reason": item.reason, "row": item.row}
            stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _key(record: Record) -> bytes:
    """Equal for records with the same conversations."""
    sides = [record.messages, record.rejected or [], *record.positives]
    text = json.dumps([[message.for_template() for message in side] for side in sides], default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _sample(records: list[Record], size: int, randomness: random.Random) -> list[Record]:
    return list(records) if size >= len(records) else [records[i] for i in randomness.sample(range(len(records)), size)]


def _repeat(records: list[Record], size: int, shuffle: bool, randomness: random.Random) -> list[Record]:
    """``size`` records: all of them as often as they fit, then a sample (the first ones without ``shuffle``)."""
    if not records:
        return []
    whole, rest = divmod(size, len(records))
    return records * whole + (_sample(records, rest, randomness) if shuffle else records[:rest])


class _Reader:
    """Reads data sets, keeping count of rows, rejected rows and the columns that were seen."""

    def __init__(
        self,
        want: str,
        columns: dict[str, str],
        strict: bool,
        system: str | None,
        identity: Identity,
        hub_options: dict[str, Any],
        *,
        has_keys: bool,
    ) -> None:
        self.want, self.columns, self.strict, self.system, self.identity = want, columns, strict, system, identity
        self.hub_options = hub_options
        self.has_keys = has_keys
        self.keys: dict[str, bytes] = {}
        self.num_rows = 0
        self.rejected: list[Rejected] = []
        self.seen_columns: dict[str, None] = {}
        self.num_placeholders = 0

    def read(self, spec: sources.Spec) -> list[Record]:
        records: list[Record] = []
        for source, row in sources.rows(spec, **self.hub_options):
            self.num_rows += 1
            if isinstance(row, dict):
                self.seen_columns.update(dict.fromkeys(map(str, row)))
            try:
                record = to_record(row, columns=self.columns, source=source)
                if self.has_keys:
                    self.keys[source] = _key(record)
                self._complete(record, row)
                reason = fault(record, self.want)
            except DataError as error:
                reason = error.message
            if reason is None:
                if not records:
                    self._tell_unused(record, row, spec.name)
                records.append(record)
                continue
            if self.strict:
                raise DataError(f"{source}: {reason}", hint="leave out --strict to go on without such rows")
            self.rejected.append(Rejected(source, row, reason))
        return records

    def _tell_unused(self, record: Record, row: dict[str, Any], name: str) -> None:
        """Say which columns lost against another of the same meaning."""
        meanings = {*ALIASES["query"], *ALIASES["response"]}
        unused = [column for column in record.extra if column in meanings]
        if unused and self.want != "grpo" and not any(column in row for column in ("messages", *ALIASES["messages"])):
            console.notice(f"{name}: {', '.join(unused)} not used, another column has the same meaning (choose with --columns)")

    def _complete(self, record: Record, row: Any) -> None:
        """Apply what the options say about every record."""
        conversations = [record.messages, *([record.rejected] if record.rejected else [])]
        if self.want == "grpo" and record.messages[-1:] and record.messages[-1].role == "assistant":
            record.extra["response"] = record.messages.pop().text()
            record.extra.update({name: row[name] for name in ALIASES["response"] if name in row})
        if self.want == "kto" and record.label in (0, 1):
            record.label = bool(record.label)
        if self.want in ("classify", "embedding", "reranker") and len(record.messages) == 1:
            record.messages[0].role = "user"
        for conversation in conversations:
            if self.system and conversation and conversation[0].role != "system" and self.want != "pt":
                conversation.insert(0, Message("system", self.system))
            if self.identity.is_given:
                self.identity.fill(conversation)
            elif has_placeholder(conversation):
                self.num_placeholders += 1
        if record.has_media():
            folder = Path(record.source.rpartition("[")[0] or record.source.rpartition(":")[0]).parent
            for files in (record.images, record.videos, record.audios):
                files[:] = [beside(folder, path) for path in files]

    def finish(self, max_rejected: float) -> None:
        """Say what was rejected; raise DataError if it was too much."""
        unseen = [name for name in self.columns if name not in self.seen_columns]
        if unseen:
            match = near(unseen[0], self.seen_columns)
            raise DataError(
                f"--columns names the column {unseen[0]!r}, which no row has",
                hint=f"did you mean {match!r}?" if match else f"columns: {', '.join(self.seen_columns)}",
            )
        if self.num_placeholders:
            console.warn(f"{self.num_placeholders} rows hold {{{{NAME}}}} or {{{{AUTHOR}}}}: give --model_name and --model_author")
        if not self.rejected:
            return
        facts = f"{len(self.rejected)} of {self.num_rows} rows are rejected"
        if len(self.rejected) > max_rejected * self.num_rows:
            raise DataError(f"{facts}, more than {max_rejected:.0%}: {summary(self.rejected)}")
        console.warn(f"{facts}: {summary(self.rejected, 1)}")
