"""Which rows each optimizer step trains: a function of the seed and the step alone, so that a resumed run needs no more."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from swift.data.order import batches


@dataclass(frozen=True)
class Steps:
    """The steps of a run over ``lengths`` (tokens of each row), ``rows_per_step`` rows a step.

    The last step of an epoch has the rows that are left, so that each row is seen once an epoch.
    """

    lengths: Sequence[int]
    rows_per_step: int
    rows_per_batch: int
    total: int
    seed: int
    shuffle: bool
    group_by_length: bool

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(len(self.lengths), self.rows_per_step)

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

    def iterate(self, start: int) -> Iterator[list[list[int]]]:
        """For each step after the first ``start``: its micro-batches of row numbers.

        Rows of a step are sorted by length before they are cut into micro-batches: the loss of the step
        is the same for every cut, and rows of similar length need less padding.
        """
        epoch, position = divmod(start, self.per_epoch)
        steps = self._of_epoch(epoch)
        for _ in range(start, self.total):
            if position == self.per_epoch:
                epoch, position = epoch + 1, 0
                steps = self._of_epoch(epoch)
            rows = sorted(steps[position], key=lambda row: -self.lengths[row])
            yield [rows[at : at + self.rows_per_batch] for at in range(0, len(rows), self.rows_per_batch)]
            position += 1

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        return batches(
            len(self.lengths),
            self.rows_per_step,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            lengths=self.lengths,
            group_by_length=self.group_by_length,
        )


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    return math.ceil(rows / rows_per_step)


def total_steps(rows: int, rows_per_step: int, *, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run: ``max_steps`` if positive, else ``epochs`` passes, rounded up."""
    if max_steps > 0:
        return max_steps
    return math.ceil(epochs * steps_per_epoch(rows, rows_per_step))
