"""Data sets to checked records: read, convert, check, sample, split, mix. Nothing here needs a model."""

import itertools
import json
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swift import console
from swift.data import sources
from swift.data.identity import Identity
from swift.data.mix import check_mixture, interleave
from swift.data.read import Reader
from swift.data.records import WANTS, Rejected, summary
from swift.data.rows import Rules
from swift.data.spool import Records, RejectedRows
from swift.errors import ConfigError, DataError
from swift.files import explain_os_errors, new_file

Indices = npt.NDArray[np.int64]


@dataclass
class Loaded:
    """Checked records, and the rows that are none: sequences whose rows lie on disk if they are many."""

    train: Records
    validation: Records
    rejected: RejectedRows
    num_proc: int
    """The number of processes that was given, or found to be useful."""


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
    interleave_prob: Sequence[float] | None = None,
    stopping_strategy: str = "first_exhausted",
    use_hf: bool | None = None,
    hub_token: str | None = None,
    offline: bool = False,
    num_proc: int | None = 1,
) -> Loaded:
    """Read ``datasets`` (see ``sources.parse_spec``) into records that serve an objective wanting ``want``.

    ``name#n`` takes n rows: a seeded sample (the first n without ``shuffle``); more than there are repeats them all,
    n // rows times, and samples the rest. ``split_ratio`` sends that share of the distinct rows, at least one, to
    validation before anything repeats; equal rows stay together. Training rows of several data sets follow each other,
    or are mixed by ``interleave_prob`` and ``stopping_strategy`` (see ``mix.interleave``; each data set is shuffled
    first, if ``shuffle``), and are shuffled in the end. ``columns`` maps column names to known ones; ``system`` is for
    rows without a system prompt; ``model_name`` and ``model_author`` (or [Chinese, English]) replace {{NAME}} and
    {{AUTHOR}}. For "grpo" a final answer moves to ``extra["response"]``. ``use_hf``, ``hub_token`` and ``offline`` are
    for ids of hubs. ``num_proc`` processes read; None lets the size of the files decide. It changes no result.

    Raises DataError if a file cannot be read, if nothing is left, if more than the share ``max_rejected`` of the rows
    is rejected, or, with ``strict``, if one is.
    """
    _check(datasets, want, val_datasets, split_ratio, interleave_prob, stopping_strategy)
    rules = Rules(
        want=want,
        columns=dict(columns or {}),
        strict=strict,
        system=system,
        identity=Identity.of(model_name, model_author),
        has_keys=split_ratio > 0,
    )
    reader = Reader(rules, {"use_hf": use_hf, "token": hub_token, "offline": offline}, num_proc)
    randomness = random.Random(data_seed)
    train: list[Indices] = []
    validation: list[Indices] = []
    for name in datasets:
        kept, held = _training_rows(reader, sources.parse_spec(name), split_ratio, shuffle, randomness)
        train.append(kept)
        validation.append(held)
    for name in val_datasets:
        spec = sources.parse_spec(name)
        rows = reader.read(spec)
        validation.append(_repeat(rows, len(rows) if spec.num_samples is None else spec.num_samples, shuffle_validation, randomness))
    told = reader.finish(max_rejected)
    if told is not None:
        console.warn(told)
    if not sum(map(len, train)):
        raise DataError("no row is left to train on", hint=summary(reader.rejected) or None)
    if val_datasets and not sum(map(len, validation)):
        raise DataError("no row is left in the validation set", hint=summary(reader.rejected) or None)
    mixed = _mix(train, list(datasets), interleave_prob, stopping_strategy, data_seed, shuffle, randomness)
    held = np.concatenate(validation)
    if shuffle:
        mixed = _shuffled(mixed, randomness)
    if shuffle_validation:
        held = _shuffled(held, randomness)
    return Loaded(Records(reader.blobs, mixed), Records(reader.blobs, held), reader.rejected, reader.num_proc or 1)


def _check(
    datasets: Sequence[str],
    want: str,
    val_datasets: Sequence[str],
    split_ratio: float,
    interleave_prob: Sequence[float] | None,
    stopping_strategy: str,
) -> None:
    if not datasets:
        raise ConfigError("no data set is given", hint="give --dataset, for instance --dataset snow-alerts")
    if want not in WANTS:
        raise ConfigError(f"unknown kind of row {want!r}", hint=f"known: {', '.join(WANTS)}")
    if val_datasets and split_ratio:
        raise ConfigError("val_dataset and split_dataset_ratio are both given", hint="set --split_dataset_ratio 0")
    if not 0 <= split_ratio < 1:
        raise ConfigError(f"split_dataset_ratio is {split_ratio}", hint="give a share of at least 0 and less than 1")
    check_mixture(interleave_prob, stopping_strategy, len(datasets))


def _training_rows(
    reader: Reader, spec: sources.Spec, split_ratio: float, shuffle: bool, randomness: random.Random
) -> tuple[Indices, Indices]:
    """(train, validation) of one data set."""
    rows = reader.read(spec)
    size = len(rows) if spec.num_samples is None else spec.num_samples
    taken = _sample(rows, size, randomness) if shuffle else rows[:size]
    kept, held = taken, taken[:0]
    if split_ratio and len(taken):
        is_held = split(reader.key_pairs()[taken], split_ratio, randomness)
        kept, held = taken[~is_held], taken[is_held]
    return _repeat(kept, size - len(held), shuffle, randomness), held


def split(keys: npt.NDArray[np.uint64], ratio: float, randomness: random.Random) -> npt.NDArray[np.bool_]:
    """Which rows go to validation: ``ratio`` of them, at least one; those of one key, a row of ``keys``, stay together.

    Raises DataError if nothing would be left for training.
    """
    order = np.lexsort(keys.T[::-1])
    is_new = np.ones(len(keys), np.bool_)
    is_new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    begins = np.flatnonzero(is_new)
    # lexsort is stable: the first of a group is the one that comes first among the rows, which orders the groups.
    first = order[begins]
    sizes = np.diff(np.append(begins, len(keys)))
    by_first = np.argsort(first)
    group_sizes = sizes[by_first].tolist()
    wanted = max(1, int(len(keys) * ratio))
    groups = array("q", range(len(group_sizes)))
    randomness.shuffle(groups)
    is_chosen = np.zeros(len(group_sizes), np.bool_)
    num_held = 0
    for group in groups:
        if num_held + group_sizes[group] <= wanted or not num_held:
            is_chosen[by_first[group]] = True
            num_held += group_sizes[group]
        if num_held >= wanted:
            break
    if num_held == len(keys):
        raise DataError(
            f"a split of {ratio} leaves nothing to train on: {len(keys)} rows, {len(group_sizes)} distinct",
            hint="add rows, or set --split_dataset_ratio 0",
        )
    is_held = np.empty(len(keys), np.bool_)
    is_held[order] = np.repeat(is_chosen, sizes)
    return is_held


def write_rejected(path: str | Path, rejected: Iterable[Rejected]) -> None:
    """Write one JSON object a line: source, reason, row."""
    with new_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.writelines(map(_rejected_line, rejected))


def append_rejected(path: str | Path, rejected: Iterable[Rejected]) -> int:
    """Add to what ``write_rejected`` wrote; the number of lines that were added."""
    lines = [_rejected_line(item) for item in rejected]
    if lines:
        with explain_os_errors(Path(path)), Path(path).open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.writelines(lines)
    return len(lines)


def keep_rejected(path: str | Path, count: int) -> None:
    """Leave the first ``count`` lines: what a killed run wrote after its last checkpoint is found again."""
    with Path(path).open(encoding="utf-8") as old, new_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as new:
        new.writelines(itertools.islice(old, count))


def _rejected_line(item: Rejected) -> str:
    line = {"source": item.source, "reason": item.reason, "row": item.row}
    return json.dumps(line, ensure_ascii=False, default=str) + "\n"


def _sample(rows: Indices, size: int, randomness: random.Random) -> Indices:
    return rows if size >= len(rows) else rows[array("q", randomness.sample(range(len(rows)), size))]


def _repeat(rows: Indices, size: int, shuffle: bool, randomness: random.Random) -> Indices:
    """``size`` rows: all of them as often as they fit, then a sample (the first ones without ``shuffle``)."""
    if not len(rows):
        return rows
    whole, rest = divmod(size, len(rows))
    return np.concatenate([np.tile(rows, whole), _sample(rows, rest, randomness) if shuffle else rows[:rest]])


def _shuffled(rows: Indices, randomness: random.Random) -> Indices:
    """Shuffled as a list of them would be, in 8 bytes a row."""
    shuffled = array("q", rows.tobytes())
    randomness.shuffle(shuffled)
    return np.frombuffer(shuffled, np.int64)


def _mix(
    train: list[Indices],
    names: list[str],
    probabilities: Sequence[float] | None,
    stopping_strategy: str,
    seed: int,
    shuffle: bool,
    randomness: random.Random,
) -> Indices:
    if probabilities is None:
        return np.concatenate(train)
    for name, rows in zip(names, train, strict=True):
        if not len(rows):
            raise DataError(f"{name}: no row is left to interleave", hint="leave the data set out, with its probability")
    if shuffle:
        train = [_shuffled(rows, randomness) for rows in train]
    chosen, rows = interleave([len(rows) for rows in train], probabilities, stopping_strategy, seed)
    mixed = np.empty(len(chosen), np.int64)
    for number, own in enumerate(train):
        is_here = chosen == number
        mixed[is_here] = own[rows[is_here]]
    used = [int((chosen == number).sum()) for number in range(len(train))]
    listed = ", ".join(f"{count:,} rows from the {len(rows):,} of {name}" for count, rows, name in zip(used, train, names, strict=True))
    console.notice(f"interleaved, {stopping_strategy}: {listed}")
    return mixed
