"""Attention in a trie of tokens: a pass computes some of its rows, each of which sees its ancestors and itself.

A token's keys and values have a place of their own in a cache of blocks of one token, which is free again when the pass has
gone by all that follows it: the tokens of the longest text and of one pass are all that is ever held.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.engine.native.pages import PagedCache, Table, attend
from swift.engine.native.trie import Ints

TILE = 64  # rows whose keys are gathered and multiplied at once

# T rows of a pass, R rows of a tile, K keys that they see, S places of the cache, H query heads, G key heads, d width of a head


@dataclass(frozen=True, eq=False)
class Tile:
    """Rows ``begin`` to ``begin`` + R of a pass, at ``positions`` (R,), and what they see: keys in ``places`` (K,), at positions
    ``seen`` (K,), as ``visible`` (R, K) says."""

    begin: int
    positions: Ints
    places: Ints
    seen: Ints
    visible: np.ndarray[Any, np.dtype[np.bool_]]

    def within(self, window: int | None) -> "Tile":
        """With keys that are less than ``window`` positions away."""
        if window is None or int(self.positions.max()) < window:
            return self
        near = self.positions[:, None] - self.seen < window
        visible = self.visible & near
        kept = visible.any(axis=0)
        return Tile(self.begin, self.positions, self.places[kept], self.seen[kept], visible[:, kept])


class Path:
    """The tokens from the beginning to the one at hand, by position, and where in the cache of ``num_places`` they are."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._places = np.zeros(num_places, np.int64)

    def take(self, positions: Ints) -> tuple[Ints, list[Tile]]:
        """Places for the next rows, at ``positions`` (T,), and their tiles. The path before them has room for T more."""
        is_free = np.ones(self.num_places, np.bool_)
        is_free[self._places[: positions[0]]] = False
        taken = np.flatnonzero(is_free)[: len(positions)]
        assert len(taken) == len(positions), "a pass has no more rows than there are places"
        tiles = []
        for begin in range(0, len(positions), TILE):
            rows = slice(begin, begin + TILE)
            tiles.append(_tile(begin, positions[rows], taken[rows], self._places))
            for position, place in zip(positions[rows], taken[rows], strict=True):
                self._places[position] = place
        return taken, tiles


def _tile(begin: int, positions: Ints, own: Ints, path: Ints) -> Tile:
    """What rows see of ``path``, which is the first one's, and of one another.

    In the order of a depth-first walk a row follows an earlier one if all between them are deeper than that one.
    """
    outside = np.arange(positions[0])
    least = np.minimum.accumulate(positions)  # what is left of the first row's path
    inside = np.zeros((len(positions), len(positions)), np.bool_)
    for row, position in enumerate(positions):
        if row:
            inside[row] = inside[row - 1] & (positions < position)
        inside[row, row] = True
    visible = np.concatenate([outside < least[:, None], inside], axis=1)
    places = np.concatenate([path[: positions[0]], own])
    return Tile(begin, positions, places, np.concatenate([outside, positions]), visible)


@dataclass(eq=False)
class Tree:
    """The attention of one pass over rows of a trie: writes their keys and values to ``written``, then lets each see its own.

    Passed to a model as ``attend``. The same for all layers, so that indices and masks are made once.
    """

    cache: PagedCache
    written: Tensor
    tiles: list[Tile]
    whole_table: Table | None = None  # the compiled attention takes one query at a time: many are better multiplied at once
    _seen: dict[int | None, list[tuple[slice, Tensor, Tensor]]] = field(default_factory=dict)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(1, T, H, d) from query (1, H, T, d), key and value (1, G, T, d)."""
        keys, values = self.cache.write(module.layer_idx, self.written, key, value)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        for rows, places, mask in self._seen_within(sliding_window):
            k, v = (part.index_select(0, places).transpose(0, 1)[None] for part in (keys, values))
            output[rows] = attend(query[:, :, rows], k, v, mask, scaling, softcap, s_aux)[0].transpose(0, 1)
        return output[None]

    def _seen_within(self, window: int | None) -> list[tuple[slice, Tensor, Tensor]]:
        """Of each tile its rows, the places that they see, and the mask (1, 1, R, K)."""
        if window not in self._seen:
            device = self.written.device
            self._seen[window] = [
                (
                    slice(tile.begin, tile.begin + len(tile.positions)),
                    torch.from_numpy(tile.places).to(device),
                    torch.from_numpy(tile.visible)[None, None].to(device),
                )
                for tile in (tile.within(window) for tile in self.tiles)
            ]
        return self._seen[window]
