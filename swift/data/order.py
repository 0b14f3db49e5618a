"""The order of examples in an epoch, and how they form batches."""

import itertools
import random
from array import array
from collections.abc import Sequence
from typing import Any, overload

# transformers' LengthGroupedSampler sorts within groups of this many batches.
_BATCHES_PER_GROUP = 50


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> Sequence[int]:
    """The indices 0 to n-1 in the order of this epoch: the same for the same arguments, another for another epoch."""
    order = array("q", range(n))  # 8 bytes an index, where a list takes 40
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class Batches(Sequence[list[int]]):
    """``order`` in lists of ``size``, the last one shorter if it must be; each is made when it is asked for."""

    def __init__(self, order: Sequence[int], size: int) -> None:
        self.order, self.size = order, size

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self.size
        return list(self.order[start : start + self.size])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def batches(
    n: int,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    lengths: Sequence[int] | Any | None = None,
    group_by_length: bool = False,
) -> Batches:
    """Index lists of ``batch_size`` examples, the last one shorter if it must be; every example once.

    ``group_by_length`` needs ``lengths`` and does what transformers' option does: the shuffled order is cut into groups
    of 50 batches (fewer for small sets: a quarter of the set), each group is sorted from long to short, and the longest
    example of all comes first, so that too large a batch fails at once.
    """
    order = epoch_order(n, seed, epoch, shuffle)
    if group_by_length:
        assert lengths is not None and len(lengths) == n
        order = _grouped(order, lengths, batch_size)
    return Batches(order, batch_size)


def _grouped(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> Sequence[int]:
    if not order:
        return order
    size = batch_size * max(1, min(len(order) // (batch_size * 4), _BATCHES_PER_GROUP))
    groups = [sorted(order[start : start + size], key=lambda index: -lengths[index]) for start in range(0, len(order), size)]
    longest = max(range(len(groups)), key=lambda group: lengths[groups[group][0]])
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return array("q", itertools.chain.from_iterable(groups))
