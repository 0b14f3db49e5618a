"""Which queries of a process see which keys of another, in pieces small enough that their scores may stand in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swift.parallel.sequence.split import PartLayout

TILE = 1024  # queries and keys of a piece at most
ROOT = -1


@dataclass(frozen=True)
class Run:
    """``length`` tokens of one segment that stand side by side from ``begin`` on in a process's part; ``depth``: tokens of the
    document before the first one."""

    begin: int
    length: int
    depth: int

    @property
    def place(self) -> slice:
        return slice(self.begin, self.begin + self.length)


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one document, the keys' depth at most the queries'; some pairs may be hidden from each other."""

    queries: Run
    keys: Run
    window: int | None

    @property
    def _nearest(self) -> int:
        """The least of: depth of a query less that of a key."""
        return self.queries.depth - (self.keys.depth + self.keys.length - 1)

    @property
    def _farthest(self) -> int:
        return self.queries.depth + self.queries.length - 1 - self.keys.depth

    @property
    def is_seen(self) -> bool:
        """Whether any query sees any key."""
        return self._farthest >= 0 and (self.window is None or self._nearest < self.window)

    def mask(self, device: torch.device) -> Tensor | None:
        """(queries, keys) bool, true where seen; None if all are."""
        if self._nearest >= 0 and (self.window is None or self._farthest < self.window):
            return None
        depths = (torch.arange(run.depth, run.depth + run.length, device=device) for run in (self.queries, self.keys))
        distance = next(depths)[:, None] - next(depths)
        return distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)


def tiles(layout: PartLayout, owner: int, window: int | None) -> list[Tile]:
    """What this process's queries see of the keys of process ``owner`` of the ring, or of the layout's root (ROOT)."""
    name = "tiles", owner, window
    if name not in layout.plans:
        keys = {ROOT: _cut(0, layout.root, 0)} if owner == ROOT else _runs(layout, owner)
        found = []
        for segment, queries in _runs(layout, layout.share.ring_rank).items():
            chain = (ROOT,) if owner == ROOT else layout.chains[segment]
            found += [Tile(mine, run, window) for mine in queries for part in chain for run in keys.get(part, ())]
        layout.plans[name] = [tile for tile in found if tile.is_seen]
    seen: list[Tile] = layout.plans[name]
    return seen


def _runs(layout: PartLayout, owner: int) -> dict[int, list[Run]]:
    """The runs of a process's tokens, by segment."""
    found: dict[int, list[Run]] = {}
    at = 0
    for begin, end in layout.blocks[owner]:
        for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            first, last = max(begin, start), min(end, start + length)
            if first < last:
                found.setdefault(segment, []).extend(_cut(at + first - begin, last - first, layout.depths[segment] + first - start))
        at += end - begin
    return found


def _cut(begin: int, length: int, depth: int) -> list[Run]:
    return [Run(begin + at, min(TILE, length - at), depth + at) for at in range(0, length, TILE)]
