"""Streaming: rows are read and tokenized while the model trains, block after block, and never all of them.

Where a block begins is a small dict, its position, and what it holds is a function of that, its number and the seed:
a resumed run reads nothing of what lies before, and gets what an uninterrupted one got.
"""

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from swift import console
from swift.data import pool
from swift.data.encode import CHUNK_ROWS, Options, encode_chunk, start_worker, work
from swift.data.encoded import Encoded
from swift.data.feed import Mixture, Taken
from swift.data.records import Record, Rejected, summary
from swift.data.rows import Tally, check_rejected, tell_pairs, tell_placeholders
from swift.data.spool import Blobs, RejectedRows, pack, rejected_line
from swift.data.writer import Chunk, Counts, Writer
from swift.errors import DataError


class Block(Protocol):
    """What training sees as one epoch: examples in memory."""

    lengths: npt.NDArray[np.int64]
    """The number of tokens of each example."""
    rejected: Sequence[Rejected]
    """Rows of this block that are not trained on; each only when its file is read for the first time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class _Block:
    """Encoded examples in the order ``order``."""

    def __init__(self, encoded: Encoded, order: npt.NDArray[np.int64], rejected: Sequence[Rejected]) -> None:
        self.encoded, self.order, self.rejected = encoded, order, rejected
        self.lengths = encoded.lengths[order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encoded[int(self.order[index])]


@dataclass
class _Seen:
    """What was seen before a block: rows and rejected rows, each counted once however often it is read, and examples."""

    rows: int = 0
    rejected: int = 0
    unreadable: int = 0
    """Those of the rejected rows that did not pass the check."""
    examples: int = 0
    tokens: int = 0
    lost: Counts = field(default_factory=Counts)


class Stream:
    """The training rows, read as they are needed.

    A block is made of the next ``block_rows`` rows that pass the check, shuffled, if ``shuffle``, by the seed and the
    number of the block; it ends early where a pass over the data ends. It does not depend on ``num_proc``. Without
    ``repeats`` there is one pass. Use it as a context manager, or call ``close``, to end its processes.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Any,
        options: Options,
        *,
        block_rows: int = 1000,
        seed: int = 42,
        shuffle: bool = True,
        repeats: bool = True,
        max_rejected: float = 0.1,
        num_proc: int = 1,
    ) -> None:
        options.check()
        self._mixture, self._tokenizer, self._options = mixture, tokenizer, options
        self._renderer = options.renderer(tokenizer)
        self.block_rows, self.seed, self.shuffle, self.repeats = block_rows, seed, shuffle, repeats
        self.max_rejected, self.num_proc = max_rejected, min(num_proc, -(-block_rows // CHUNK_ROWS))
        self._stack = contextlib.ExitStack()
        self._pool: ProcessPoolExecutor | None = None
        self._number = 0
        self._has_ended = False
        self._seen = _Seen()
        self._positions = {0: self._position()}
        self._last: tuple[int, Block | None] | None = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; the next block would start them again."""
        self._stack.close()
        self._pool = None

    def block(self, number: int) -> Block | None:
        """Block ``number``, or None after the last one of data that does not repeat.

        The block after the last one that was asked for is read, that one itself is at hand, and the one before is read
        again; farther back needs ``seek``. Raises DataError if a row cannot be read or too many are rejected so far.
        """
        if self._last is None or self._last[0] != number:
            if number < self._number:
                self.seek(number, self.position(number))
            while self._number < number and not self._has_ended:
                self._read()
            self._last = (number, None if self._has_ended else self._read())
        return self._last[1]

    def position(self, number: int) -> dict[str, Any]:
        """Where block ``number`` begins, as JSON can hold it: of the last block that was read and of its neighbours."""
        assert number in self._positions, f"block {number} is not one of {sorted(self._positions)}"
        return self._positions[number]

    def seek(self, number: int, position: dict[str, Any]) -> None:
        """Let block ``number`` begin at ``position``. Raises DataError if the files are not those of the position."""
        self._mixture.seek(position["mixture"])
        self._seen = _Seen(**{**position["seen"], "lost": Counts(**position["seen"]["lost"])})
        self._number, self._has_ended, self._last = number, position["has_ended"], None
        self._positions = {number: position}

    def stats(self) -> dict[str, Any]:
        """Counts up to the last block that was read, with the names of ``Encoded.stats``.

        ``rows`` and ``rejected`` count a row once, the others each time it is read. ``passes`` are those that are done.
        """
        seen = self._seen
        once = {"rows": seen.rows, "rejected": seen.rejected, "tokens": seen.tokens, "passes": self._mixture.number}
        return {"examples": seen.examples, **asdict(seen.lost), **once}

    def _position(self) -> dict[str, Any]:
        return {"mixture": self._mixture.position(), "seen": asdict(self._seen), "has_ended": self._has_ended}

    def _read(self) -> Block | None:
        """Read block ``self._number``, which has at least one example; None if no row is left."""
        rejected = Blobs()
        tally = Tally()
        with Writer(is_paired=self._options.objective == "preference", place=None) as writer:
            while writer.num_examples == 0 and not self._has_ended:
                rows = self._take(rejected, tally)
                repeated = {row.record.source for row in rows if not row.is_first_round}
                for chunk in self._encode([row.record for row in rows]):
                    writer.add(chunk)
                    for line in chunk.rejected:
                        if not repeated or json.loads(line)["source"] not in repeated:
                            rejected.append(line)
                if self._mixture.number and writer.num_examples == self._seen.examples == 0:
                    raise DataError("no row is left to train on", hint=summary(RejectedRows(rejected)) or None)
            self._count(writer, tally, rejected)
            encoded = writer.finish() if writer.num_examples else None
        self._tell(tally, RejectedRows(rejected))
        order = list(range(writer.num_examples))
        if self.shuffle:
            random.Random(f"{self.seed}/{self._number}").shuffle(order)
        self._number += 1
        self._positions = {at: position for at, position in self._positions.items() if at >= self._number - 2}
        self._positions[self._number] = self._position()
        return None if encoded is None else _Block(encoded, np.array(order, np.int64), RejectedRows(rejected))

    def _take(self, rejected: Blobs, tally: Tally) -> list[Taken]:
        """The rows of a block, or up to the end of the pass, which begins the next one."""
        rows: list[Taken] = []
        while len(rows) < self.block_rows:
            taken = self._mixture.take()
            rows.append(taken)
            tally.add(taken.tally)
            for item in taken.rejected:
                rejected.append(rejected_line(item))
            if taken.is_last:
                self._has_ended = not self.repeats
                self._mixture.begin_pass(self._mixture.number + 1)
                break
        return rows

    def _encode(self, records: list[Record]) -> Iterator[Chunk]:
        starts = range(0, len(records), CHUNK_ROWS)
        if self.num_proc == 1 or len(starts) == 1:
            for start in starts:
                yield encode_chunk(self._renderer, self._options, start, records[start : start + CHUNK_ROWS])
            return
        if self._pool is None:
            self._pool = self._stack.enter_context(pool.workers(self.num_proc, start_worker, (self._tokenizer, self._options)))
        parts = ((start, [pack(record) for record in records[start : start + CHUNK_ROWS]]) for start in starts)
        yield from pool.in_order(self._pool, self.num_proc, work, parts)

    def _count(self, writer: Writer, tally: Tally, rejected: Blobs) -> None:
        seen = self._seen
        seen.rows += tally.num_rows
        seen.unreadable += tally.num_rejected
        seen.rejected += len(rejected)
        seen.examples += writer.num_examples
        seen.tokens += writer.num_tokens
        seen.lost.add(writer.counts)

    def _tell(self, tally: Tally, rejected: RejectedRows) -> None:
        """Raise DataError if too many rows are rejected so far; after the first block say what else was seen."""
        so_far = Tally(num_rows=self._seen.rows, num_rejected=self._seen.unreadable)
        told = check_rejected(so_far, rejected, self.max_rejected)
        if self._number:
            return
        if told:
            console.warn(f"first block: {told}")
        tell_placeholders(tally)
        tell_pairs(tally)
        if unseen := [name for name in self._mixture.columns if name not in tally.columns]:
            console.warn(f"--columns names {', '.join(unseen)}, which no row of the first block has")
