"""Which tokens of a flattened batch belong together: documents side by side, and beginnings that several documents share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

# T tokens of the flattened batch, K keys that a segment sees


@dataclass(frozen=True)
class Layout:
    """Segments of a flat row of tokens, in order, each with the segment that it continues.

    A document is a chain: its last segment, that one's parent, and so on to a segment without a parent (-1). Documents
    without a common beginning are one segment each. A token sees its chain up to itself and nothing else. A parent
    stands before its children, so that keys are always at smaller indices than queries.

    ``root``: tokens that every document begins with and that were computed before, in a pass of their own. They are no
    part of the row; their keys stand before its own.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    root: int = 0

    @classmethod
    def of_documents(cls, lengths: Sequence[int], root: int = 0) -> "Layout":
        """Documents that share nothing but the root."""
        return cls(tuple(lengths), (-1,) * len(lengths), root)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of the first token of each segment."""
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return tuple(starts)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Tokens of the document that come before each segment."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(self.root if parent < 0 else depths[parent] + self.lengths[parent])
        return tuple(depths)

    @cached_property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """For each segment: the segments of its chain, the first one first, itself last."""
        chains: list[tuple[int, ...]] = []
        for index, parent in enumerate(self.parents):
            chains.append((*(chains[parent] if parent >= 0 else ()), index))
        return tuple(chains)

    @cached_property
    def spans(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each segment: where the keys that it sees begin and end among those of the root and the row, adjoining ones as one."""
        spans = []
        for chain in self.chains:
            seen = [(0, self.root)] if self.root else []
            for part in chain:
                begin = self.root + self.starts[part]
                if seen and seen[-1][1] == begin:
                    begin = seen.pop()[0]
                seen.append((begin, self.root + self.starts[part] + self.lengths[part]))
            spans.append(tuple(seen))
        return tuple(spans)

    @cached_property
    def masks(self) -> dict[Any, torch.Tensor]:
        """Masks of segments that all layers of a pass ask for, made when first needed; gone with the layout."""
        return {}

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def position_ids(self) -> torch.Tensor:
        """(1, T) int64: the place of each token in its document."""
        parts = [torch.arange(depth, depth + length) for depth, length in zip(self.depths, self.lengths, strict=True)]
        return torch.cat(parts).unsqueeze(0)

    def document_lengths(self) -> torch.Tensor:
        """(T,) int64: how long the document of each token is; the longest one if several share it."""
        longest = [depth + length for depth, length in zip(self.depths, self.lengths, strict=True)]
        for segment in reversed(range(len(longest))):
            if (parent := self.parents[segment]) >= 0:
                longest[parent] = max(longest[parent], longest[segment])
        return torch.tensor(longest).repeat_interleave(torch.tensor(self.lengths))

    def mask(self) -> torch.Tensor:
        """(T, root + T) bool, true where the row's token sees the column's: the definition that faster ways are tested against."""
        seen = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool)
        for start, length, chain in zip(self.starts, self.lengths, self.chains, strict=True):
            for segment in chain[:-1]:
                begin = self.starts[segment]
                seen[start : start + length, begin : begin + self.lengths[segment]] = True
            seen[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
        return torch.cat([torch.ones(self.num_tokens, self.root, dtype=torch.bool), seen], dim=1)

    @cached_property
    def varlen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """What kernels for sequences of unequal length take: (key index (K,), ends of queries, ends of keys, most queries, most keys).

        The keys of each segment are gathered, so a shared beginning is read by each segment that continues it; such
        kernels align the last query with the last key, which is what a continued segment needs.
        """
        spans = [
            torch.arange(self.root + start, self.root + start + length) for start, length in zip(self.starts, self.lengths, strict=True)
        ]
        keys = [torch.cat([torch.arange(self.root), *(spans[part] for part in chain)]) for chain in self.chains]
        ends_q = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        ends_k = torch.tensor([0, *(len(key) for key in keys)]).cumsum(0).to(torch.int32)
        return torch.cat(keys), ends_q, ends_k, max(self.lengths), max(len(key) for key in keys)
