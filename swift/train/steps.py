"""Which rows each optimizer step trains: a function of the seed and the step, so that a resumed run needs no more.

Rows that are all known are one block that is trained again and again, in another order each time. A stream is one block
after the other; where the next one begins is kept in the checkpoint.
"""

import functools
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swift.config.commands import SftConfig
from swift.data.encoded import Encoded
from swift.data.order import Batches, batches
from swift.data.packing import first_fit_decreasing, pack
from swift.data.records import Rejected
from swift.data.stream import Block, Stream
from swift.errors import DataError
from swift.model.device import choose_device

# One forward pass on a CPU: products of matrices are nearly as fast as they get, and activations are few.
CPU_TOKENS = 1024

Lengths = Sequence[int] | npt.NDArray[Any]
Example = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a run is in its rows: ``step`` steps into block ``block``, which begins at ``position`` of a stream."""

    block: int = 0
    step: int = 0
    position: dict[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """The examples of each forward pass of one reader, and where the run is after them."""

    passes: list[list[Example]]
    after: Place
    rejected: Sequence[Rejected] = ()  # rows that were passed over to get here


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How rows become steps and forward passes.

    A step has ``units_per_step`` rows or packs, dealt to ``readers``: processes that see different rows. How it is dealt and
    cut into forward passes does not change its loss: with padding they are ``rows_per_batch`` rows; without, as many as
    ``capacity`` tokens hold.
    """

    units_per_step: int
    rows_per_batch: int
    capacity: int | None
    seed: int
    shuffle: bool
    group_by_length: bool
    packing_length: int | None = None  # None: rows are not packed
    packing_strategy: str = "binpack"
    share: bool = True
    is_cpu: bool = True
    readers: int = 1

    def packs(self, rows: Any) -> list[list[int]] | None:
        """The packs of ``rows`` that are the units of its steps; None if single rows are."""
        if self.packing_length is None:
            return None
        lengths = rows.lengths
        return pack(rows, lengths, max(self.packing_length, int(lengths.max())), strategy=self.packing_strategy, share=self.share)

    def order(self, rows: Any, packs: Sequence[Sequence[int]] | None, epoch: int) -> Batches:
        """The units of each step of an epoch. The last step has what is left, so that each row is seen once."""
        return batches(
            len(rows) if packs is None else len(packs),
            self.units_per_step,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            lengths=rows.lengths,
            group_by_length=self.group_by_length,
        )

    def shares(self, units: list[int], packs: Sequence[Sequence[int]] | None, lengths: Lengths, *, is_flat: bool) -> list[list[list[int]]]:
        """The forward passes of a step, of each reader. Readers may have unequal numbers of them, and none at all."""
        if self.readers == 1:
            return [self.passes(units, packs, lengths, is_flat=is_flat)]
        costs = [int(lengths[unit]) if packs is None else sum(int(lengths[row]) for row in packs[unit]) for unit in units]
        most = len(units) if is_flat and packs is None else -(-len(units) // self.readers)
        dealt = deal(costs, self.readers, most)
        return [self.passes([units[at] for at in own], packs, lengths, is_flat=is_flat) if own else [] for own in dealt]

    def passes(self, units: list[int], packs: Sequence[Sequence[int]] | None, lengths: Lengths, *, is_flat: bool) -> list[list[int]]:
        """The rows of each forward pass of a step."""
        if packs is not None:
            assert self.packing_length is not None
            size = max(sum(int(lengths[row]) for row in packs[unit]) for unit in units)
            # What a pack shares is computed once, so that no pack needs more than its length.
            size = min(size, max(self.packing_length, *(int(lengths[row]) for unit in units for row in packs[unit])))
            at_once = max(1, self.tokens(size) // size)
            groups = [units[at : at + at_once] for at in range(0, len(units), at_once)]
            return [[row for unit in group for row in packs[unit]] for group in groups]
        if is_flat:
            return cut_by_tokens(units, lengths, self.tokens(max(int(lengths[row]) for row in units)))
        # Rows of similar length need less padding.
        rows = sorted(units, key=lambda row: -lengths[row])
        return [rows[at : at + self.rows_per_batch] for at in range(0, len(rows), self.rows_per_batch)]

    def tokens(self, longest: int) -> int:
        """Tokens of a forward pass whose longest row has ``longest``: what padded rows could need; fewer on a CPU."""
        allowed = self.capacity or self.rows_per_batch * longest
        return max(longest, min(allowed, CPU_TOKENS) if self.is_cpu and self.capacity is None else allowed)


@dataclass(frozen=True)
class Steps:
    """The steps of a run over ``rows``."""

    rows: Encoded | Stream
    cutting: Cutting
    total: int

    @property
    def per_epoch(self) -> int | None:
        """Steps of one pass over the rows; None for a stream."""
        if isinstance(self.rows, Stream):
            return None
        return -(-(len(self.rows) if self.packs is None else len(self.packs)) // self.cutting.units_per_step)

    @functools.cached_property
    def packs(self) -> list[list[int]] | None:
        """The packs of rows that are all known."""
        assert isinstance(self.rows, Encoded)
        return self.cutting.packs(self.rows)

    def epoch_at(self, step: int) -> float:
        """Epochs that are done after ``step`` steps; of a stream the share of the run."""
        return step / (self.per_epoch or self.total)

    def ends_epoch(self, step: int) -> bool:
        """Whether the ``step``-th step (counted from 1) is the last of an epoch, or of the run."""
        return step == self.total or (self.per_epoch is not None and step % self.per_epoch == 0)

    def is_due(self, strategy: str | None, every: int | None, step: int) -> bool:
        """Whether what happens by ``strategy`` (no, steps, epoch), ``every`` so many steps, is due after ``step``."""
        if strategy == "steps":
            return step % (every or 1) == 0
        return strategy == "epoch" and self.ends_epoch(step)

    def place_at(self, step: int) -> Place:
        """The place after ``step`` steps of rows that are all known."""
        return Place(*divmod(step, self.per_epoch)) if self.per_epoch else Place()

    def iterate(self, start: Place, *, is_flat: bool, reader: int = 0) -> Iterator[Step]:
        """The steps from ``start`` on, without end, as ``reader`` sees them; all readers have equally many passes of a step."""
        number, done = start.block, start.step
        if isinstance(self.rows, Stream) and start.position is not None:
            self.rows.seek(number, start.position)
        while True:
            rows, packs, position = self._block(number)
            order = self.cutting.order(rows, packs, number)
            for index in range(done, len(order)):
                shares = self.cutting.shares(order[index], packs, rows.lengths, is_flat=is_flat)
                passes = list(passes_of(rows, shares, reader))
                is_last = index + 1 == len(order)
                after = Place(number + 1, 0, self._position(number + 1)) if is_last else Place(number, index + 1, position)
                news = rows.rejected if index == 0 and isinstance(self.rows, Stream) else ()
                yield Step(passes, after, news)
            number, done = number + 1, 0

    def _block(self, number: int) -> tuple[Encoded | Block, list[list[int]] | None, dict[str, Any] | None]:
        if isinstance(self.rows, Encoded):
            return self.rows, self.packs, None
        block = self.rows.block(number)
        if block is None:
            raise DataError("the data has come to its end")
        return block, self.cutting.packs(block), self._position(number)

    def _position(self, number: int) -> dict[str, Any] | None:
        return self.rows.position(number) if isinstance(self.rows, Stream) else None


def plan_steps(config: SftConfig, rows: Encoded | Stream, *, readers: int = 1, units_per_step: int | None = None) -> Steps:
    """The steps that ``config`` asks for, of ``readers``; ``units_per_step`` are those of the run that goes on."""
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    assert accumulation is not None
    packing_length = None
    if config.packing:
        packing_length = config.packing_length or config.max_length or int(rows.lengths.max())  # type: ignore[union-attr]
    cutting = Cutting(
        units_per_step=units_per_step or batch * accumulation * readers,
        rows_per_batch=batch,
        capacity=config.max_tokens_per_batch,
        seed=config.data_seed,
        shuffle=config.train_dataloader_shuffle,
        group_by_length=config.group_by_length,
        packing_length=packing_length,
        packing_strategy=config.packing_strategy,
        share=config.share_prefixes,
        is_cpu=choose_device(config.device).type == "cpu",
        readers=readers,
    )
    if config.max_steps > 0:
        return Steps(rows, cutting, config.max_steps)
    per_epoch = Steps(rows, cutting, 0).per_epoch
    assert per_epoch is not None
    return Steps(rows, cutting, math.ceil(config.num_train_epochs * per_epoch))


def deal(costs: Sequence[int], readers: int, most: int) -> list[list[int]]:
    """Indices of ``costs``, each to the reader that has least so far, the costliest first; at most ``most`` to each.

    No reader has more than 4/3 of the least possible maximum (Graham 1969), where ``most`` does not interfere.
    """
    dealt: list[list[int]] = [[] for _ in range(readers)]
    free = [(0, reader) for reader in range(readers)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        cost, reader = heapq.heappop(free)
        dealt[reader].append(index)
        if len(dealt[reader]) < most:
            heapq.heappush(free, (cost + costs[index], reader))
    return [sorted(own) for own in dealt]


def passes_of(rows: Any, shares: list[list[list[int]]], reader: int) -> Iterator[list[Example]]:
    """The examples of each pass of ``reader``, with as many passes more as another reader has at most: the shortest row, which fills."""
    for part in shares[reader]:
        yield [rows[row] for row in part]
    if missing := max(map(len, shares)) - len(shares[reader]):
        shortest = min((row for share in shares for part in share for row in part), key=lambda row: (int(rows.lengths[row]), row))
        yield from [[filler(rows[shortest])]] * missing


def filler(example: Example) -> Example:
    """``example`` with predictions of weight 0: what a process computes that must take part and has no rows left."""
    if "chosen" in example:
        return {**example, **{side: filler(example[side]) for side in ("chosen", "rejected")}}
    return {**example, "weights": np.zeros(len(example["labels"]), np.float32), "is_filler": True}


def cut_by_tokens(rows: Sequence[int], lengths: Lengths, capacity: int) -> list[list[int]]:
    """``rows`` in as few forward passes of at most ``capacity`` tokens as may be; a longer row goes alone."""
    own = [int(lengths[row]) for row in rows]
    return [[rows[index] for index in group] for group in first_fit_decreasing(own, max(capacity, *own))]
