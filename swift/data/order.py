"""The order of examples in an epoch, and how they form batches."""

import random
from collections.abc import Sequence
from typing import Any

# transformers' LengthGroupedSampler sorts within groups of this many batches.
_BATCHES_PER_GROUP = 50


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The indices 0 to n-1 in the order of this epoch: the same for the same arguments, another for another epoch."""
    order = list(range(n))
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def batches(
    n: int,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    lengths: Sequence[int] | Any | None = None,
    group_by_length: bool = False,
) -> list[list[int]]:
    """Index lists of ``batch_size`` examples, the last one shorter if it must be; every example once.

    ``group_by_length`` needs ``lengths`` and does what transformers' option does: the shuffled order is cut into groups
    of 50 batches (fewer for small sets: a quarter of the set), each group is sorted from long to short, and the longest
    example of all comes first, so that too large a batch fails at once.
    """
    order = epoch_order(n, seed, epoch, shuffle)
    if group_by_length:
        assert lengths is not None and len(lengths) == n
        order = _grouped(order, lengths, batch_size)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


def _grouped(order: list[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    if not order:
        return []
    size = batch_size * max(1, min(len(order) // (batch_size * 4), _BATCHES_PER_GROUP))
    groups = [sorted(order[start : start + size], key=lambda index: -lengths[index]) for start in range(0, len(order), size)]
    longest = max(range(len(groups)), key=lambda group: lengths[groups[group][0]])
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return [index for group in groups for index in group]
