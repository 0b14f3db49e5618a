"""Which rows are computed together: packs of at most so many tokens."""

import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from swift.data.prefix import MIN_SHARED, common_prefix
from swift.errors import DataError

Lengths = Sequence[int] | npt.NDArray[Any]
# Rows are compared by digests of their first 32, 64, 128, ... tokens beyond what all rows have in common.
_LEVELS = tuple(32 * 2**level for level in range(8))


def first_fit_decreasing(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Group indices so that the lengths of each group sum to at most ``capacity``; the longest first, each where it fits first.

    Never more than 11/9 of the fewest possible groups, plus 6/9 (Dosa 2007). Raises DataError if one length exceeds
    ``capacity``.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        by_length[int(length)].append(index)
    _check(max(by_length, default=0), capacity)
    size = 1
    while size < len(lengths):
        size *= 2
    space = [capacity] * (2 * size)  # a tree: each node has the most space of any bin below it
    bins: list[list[int]] = []
    for length in sorted(by_length, reverse=True):
        waiting = by_length[length]
        while waiting:
            node = 1
            while node < size:
                node = 2 * node if space[2 * node] >= length else 2 * node + 1
            count = len(waiting) if length == 0 else min(len(waiting), space[node] // length)
            if node - size == len(bins):
                bins.append([])
            bins[node - size] += waiting[:count]
            del waiting[:count]
            space[node] -= count * length
            while node > 1:
                node //= 2
                space[node] = max(space[2 * node], space[2 * node + 1])
    return bins


def sequential(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Group neighbours in their order; a group ends before the row that would exceed ``capacity``."""
    _check(max((int(length) for length in lengths), default=0), capacity)
    groups: list[list[int]] = []
    filled = capacity
    for index, length in enumerate(lengths):
        if filled + length > capacity:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += int(length)
    return groups


def pack(rows: Any, lengths: Lengths, capacity: int, *, strategy: str = "binpack", share: bool = True) -> list[list[int]]:
    """Packs of at most ``capacity`` computed tokens over all ``rows`` (examples with ``input_ids``).

    With ``share``, rows that begin alike go into the same packs, where their beginning counts once; the rest is packed by
    length. ``sequential`` keeps the order of the rows.
    """
    _check(max((int(length) for length in lengths), default=0), capacity)
    if strategy == "sequential":
        return sequential(lengths, capacity)
    if not share:
        return first_fit_decreasing(lengths, capacity)
    root = _common_to_all(rows)
    root = root if root >= MIN_SHARED else 0
    groups: list[list[int]] = []  # rows that stay together, each with the tokens it adds to a pack that holds the root
    costs: list[int] = []
    for family in _families(rows, root):
        for members, cost in _fill(rows, family, capacity, root):
            groups.append(members)
            costs.append(cost - root)
    return [[row for group in bin_ for row in groups[group]] for bin_ in first_fit_decreasing(costs, capacity - root)]


def _fill(rows: Any, family: list[int], capacity: int, root: int) -> list[tuple[list[int], int]]:
    """(rows, computed tokens) of packs that are filled in order; each row costs what it does not share with the one before."""
    filled: list[tuple[list[int], int]] = []
    previous = None
    for row in family:
        ids = rows[row]["input_ids"]
        shared = common_prefix(previous, ids) if previous is not None else 0
        cost = len(ids) - (shared if shared >= MIN_SHARED else 0)
        if filled and filled[-1][1] + cost <= capacity:
            filled[-1] = ([*filled[-1][0], row], filled[-1][1] + cost)
        else:
            filled.append(([row], len(ids)))
        previous = ids
    return filled


def _families(rows: Any, root: int) -> list[list[int]]:
    """Rows by how they begin: those that share 32 tokens beyond the ``root`` together, deeper shared ones next to each other."""
    keys: dict[int, list[bytes]] = {}
    for row in range(len(rows)):
        ids = np.ascontiguousarray(rows[row]["input_ids"][root:], dtype=np.int64)
        cuts = _LEVELS[: bisect_left(_LEVELS, len(ids)) + 1]
        keys[row] = [hashlib.blake2b(ids[:cut].tobytes(), digest_size=8).digest() for cut in cuts]
    by_beginning: dict[bytes, list[int]] = defaultdict(list)
    for row, key in keys.items():
        by_beginning[key[0]].append(row)
    return [sorted(family, key=lambda row: (keys[row], row)) for family in by_beginning.values()]


def _common_to_all(rows: Any) -> int:
    """Tokens with which every row begins."""
    first = rows[0]["input_ids"]
    shared = len(first)
    for row in range(1, len(rows)):
        shared = min(shared, common_prefix(first[:shared], rows[row]["input_ids"]))
        if shared < MIN_SHARED:
            return 0
    return shared


def _check(longest: int, capacity: int) -> None:
    if longest > capacity:
        raise DataError(f"a row of {longest} tokens does not fit into a pack of {capacity}", hint="raise --packing_length or cut rows")
