"""Data sets into rows on disk, by one process or by several: the result is the same."""

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swift.data import files, pool, sources
from swift.data.formats import FORMATS, ORDER
from swift.data.records import Rejected
from swift.data.rows import KEY_BYTES, Rules, Tally, check_columns, check_rejected, check_row, tell_pairs, tell_placeholders, tell_unused
from swift.data.spool import Blobs, RejectedRows, pack, rejected_line
from swift.errors import DataError

_BATCH_ROWS = 4096
_RANGE_BYTES = 4 << 20
# Starting processes takes as long as to read this much.
_SMALL_BYTES = 16 << 20


@dataclass
class Batch:
    """Some rows, read and checked: records as one byte string, their lengths and keys, and the rejected ones."""

    records: bytearray = field(default_factory=bytearray)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    keys: bytearray = field(default_factory=bytearray)
    rejected: list[bytes] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


Range = tuple[Path, files.Place, int | None]


def read_range(part: Range, rules: Rules) -> Iterator[Batch]:
    """The rows of a range of a file, in batches."""
    path, place, stop = part
    rows = files.read_from(path, place, stop)
    while True:
        batch = Batch()
        for _, source, row in itertools.islice(rows, _BATCH_ROWS):
            checked = check_row(source, row, rules, batch.tally)
            if isinstance(checked, Rejected):
                batch.rejected.append(rejected_line(checked))
                continue
            blob = pack(checked[0])
            batch.records += blob
            batch.lengths.append(len(blob))
            if checked[1] is not None:
                batch.keys += checked[1]
        if not batch.tally.num_rows:
            return
        yield batch


class Reader:
    """Reads data sets one after the other. ``num_proc`` None means one process, and several for large files."""

    def __init__(self, rules: Rules, hub_options: dict[str, Any], num_proc: int | None = 1) -> None:
        self.rules, self.hub_options, self.num_proc = rules, hub_options, num_proc
        self.blobs = Blobs()
        self.keys = bytearray()
        self.rejected_lines = Blobs()
        self.rejected = RejectedRows(self.rejected_lines)
        self.tally = Tally()

    def read(self, spec: sources.Spec) -> npt.NDArray[np.int64]:
        """The numbers of the data set's records among ``blobs``. Raises DataError if it has no rows."""
        start = len(self.blobs)
        tally = Tally()
        for batch in self._batches(sources.locate(spec, **self.hub_options)):
            if tally.num_rows == tally.num_rejected:
                tell_unused(batch.tally, spec.name)
            tally.add(batch.tally)
            self.blobs.extend(batch.records, batch.lengths)
            self.keys += batch.keys
            for line in batch.rejected:
                self.rejected_lines.append(line)
        if not tally.num_rows:
            raise DataError(f"{spec.name} has no rows")
        self.tally.add(tally)
        return np.arange(start, len(self.blobs), dtype=np.int64)

    def key_pairs(self) -> npt.NDArray[np.uint64]:
        """The key of each record as two numbers, (records, 2)."""
        return np.frombuffer(self.keys, np.uint64).reshape(-1, KEY_BYTES // 8)

    def finish(self, max_rejected: float) -> str | None:
        """What to say of rejected rows, if there are any. Raises DataError if there are too many."""
        check_columns(self.tally, self.rules)
        tell_placeholders(self.tally)
        tell_pairs(self.tally)
        return check_rejected(self.tally, self.rejected, max_rejected)

    def _batches(self, paths: list[Path]) -> Iterator[Batch]:
        num_proc = self._processes(paths)
        if num_proc == 1:
            for path in paths:
                yield from read_range((path, files.START, None), self.rules)
            return
        with pool.workers(num_proc, _start_worker, (self.rules,)) as workers:
            for can_be_cut, group in itertools.groupby(paths, files.can_be_cut):
                if can_be_cut:
                    ranges = ((path, *part) for path in group for part in files.cut(path, _RANGE_BYTES))
                    for batches in pool.in_order(workers, num_proc, _work, ranges):
                        yield from batches
                else:
                    for path in group:
                        yield from read_range((path, files.START, None), self.rules)

    def _processes(self, paths: list[Path]) -> int:
        """How many processes are worth starting."""
        sizes = [path.stat().st_size for path in paths if files.can_be_cut(path)]
        if self.num_proc is None and sum(path.stat().st_size for path in paths) >= pool.MANY_BYTES:
            self.num_proc = pool.usual()
        if sum(sizes) < _SMALL_BYTES or not _others_know_the_formats():
            return 1
        return max(1, min(self.num_proc or 1, sum(-(-size // _RANGE_BYTES) for size in sizes)))


def _others_know_the_formats() -> bool:
    """Whether every layout is one of ours or of an installed distribution, and none was registered in this process."""
    known = {*ORDER, *(point.name for point in entry_points(group=FORMATS.group or ""))}
    return known.issuperset(FORMATS)


_rules: Rules | None = None


def _start_worker(rules: Rules) -> None:
    global _rules
    _rules = rules


def _work(part: Range) -> list[Batch]:
    assert _rules is not None
    return list(read_range(part, _rules))
