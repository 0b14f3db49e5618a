"""Which rows each optimizer step trains: a function of the seed and the step alone, so that a resumed run needs no more."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from swift.config.commands import SftConfig
from swift.data.encoded import Encoded
from swift.data.order import batches
from swift.data.packing import first_fit_decreasing, pack
from swift.model.device import choose_device

# One forward pass on a CPU: products of matrices are as fast as they get, and activations are few.
CPU_TOKENS = 512

Lengths = Sequence[int] | npt.NDArray[Any]


@dataclass(frozen=True)
class Steps:
    """The steps of a run over rows of ``lengths`` tokens, ``units_per_step`` rows or ``packs`` a step.

    The last step of an epoch has what is left, so that each row is seen once an epoch. How a step is cut into forward
    passes does not change its loss: with padding they are ``rows_per_batch`` rows, without as many as ``capacity``
    tokens hold.
    """

    lengths: Lengths
    units_per_step: int
    rows_per_batch: int
    capacity: int
    total: int
    seed: int
    shuffle: bool
    group_by_length: bool
    packs: Sequence[Sequence[int]] | None = None

    @property
    def num_units(self) -> int:
        return len(self.lengths) if self.packs is None else len(self.packs)

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.num_units, self.units_per_step)

    def epoch_at(self, step: int) -> float:
        """Epochs that are done after ``step`` steps."""
        return step / self.per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether the ``step``-th step (counted from 1) is the last of an epoch, or of the run."""
        return step % self.per_epoch == 0 or step == self.total

    def is_due(self, strategy: str | None, every: int | None, step: int) -> bool:
        """Whether what happens by ``strategy`` (no, steps, epoch), ``every`` so many steps, is due after ``step``."""
        if strategy == "steps":
            return step % (every or 1) == 0
        return strategy == "epoch" and self.ends_epoch(step)

    def iterate(self, start: int, *, is_flat: bool) -> Iterator[list[list[int]]]:
        """For each step after the first ``start``: the row numbers of its forward passes."""
        epoch, position = divmod(start, self.per_epoch)
        steps = self._of_epoch(epoch)
        for _ in range(start, self.total):
            if position == self.per_epoch:
                epoch, position = epoch + 1, 0
                steps = self._of_epoch(epoch)
            yield self._cut(steps[position], is_flat=is_flat)
            position += 1

    def _cut(self, units: list[int], *, is_flat: bool) -> list[list[int]]:
        if self.packs is not None:
            at_once = max(1, self.capacity // max(sum(self.lengths[row] for row in self.packs[unit]) for unit in units))
            groups = [units[at : at + at_once] for at in range(0, len(units), at_once)]
            return [[row for unit in group for row in self.packs[unit]] for group in groups]
        if is_flat:
            return cut_by_tokens(units, self.lengths, self.capacity)
        # Rows of similar length need less padding.
        rows = sorted(units, key=lambda row: -self.lengths[row])
        return [rows[at : at + self.rows_per_batch] for at in range(0, len(rows), self.rows_per_batch)]

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        return batches(
            self.num_units,
            self.units_per_step,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            lengths=self.lengths,
            group_by_length=self.group_by_length,
        )


def plan_steps(config: SftConfig, rows: Encoded) -> Steps:
    """The steps that ``config`` asks for."""
    lengths = rows.lengths
    longest = int(lengths.max())
    packs = None
    if config.packing:
        length = config.packing_length or config.max_length or longest
        packs = pack(rows, lengths, max(length, longest), strategy=config.packing_strategy, share=config.share_prefixes)
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    assert accumulation is not None
    num_units = len(lengths) if packs is None else len(packs)
    is_cpu = choose_device(config.device).type == "cpu"
    return Steps(
        lengths=lengths,
        units_per_step=batch * accumulation,
        rows_per_batch=batch,
        capacity=config.max_tokens_per_batch or forward_tokens(batch, longest, is_cpu=is_cpu),
        total=total_steps(num_units, batch * accumulation, epochs=config.num_train_epochs, max_steps=config.max_steps),
        seed=config.data_seed,
        shuffle=config.train_dataloader_shuffle,
        group_by_length=config.group_by_length,
        packs=packs,
    )


def cut_by_tokens(rows: Sequence[int], lengths: Lengths, capacity: int) -> list[list[int]]:
    """``rows`` in as few forward passes of at most ``capacity`` tokens as may be; a longer row goes alone."""
    own = [int(lengths[row]) for row in rows]
    return [[rows[index] for index in group] for group in first_fit_decreasing(own, max(capacity, *own))]


def forward_tokens(rows: int, longest: int, *, is_cpu: bool) -> int:
    """Tokens of one forward pass: what ``rows`` padded rows could need, which the user allows; fewer on a CPU."""
    allowed = rows * longest
    return max(longest, min(allowed, CPU_TOKENS)) if is_cpu else allowed


def steps_per_epoch(units: int, units_per_step: int) -> int:
    return math.ceil(units / units_per_step)


def total_steps(units: int, units_per_step: int, *, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run: ``max_steps`` if positive, else ``epochs`` passes, rounded up."""
    if max_steps > 0:
        return max_steps
    return math.ceil(epochs * steps_per_epoch(units, units_per_step))
