"""How Megatron-Core lays weights out, as operations on tensors: each has its inverse, and both move numbers, never change them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# A heads, G groups of heads that share keys and values, H numbers of a head, D model width, V vocabulary


@dataclass(frozen=True)
class Dims:
    """What the operations must know of a model."""

    heads: int
    groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int


def padded_vocabulary(size: int, *, multiple: int, tp: int) -> int:
    """Rows of the embedding: the next multiple of ``multiple`` that ``tp`` processes divide.

    Megatron-LM takes one of ``multiple`` times ``tp``. This one is the same for all layouts of as many as ``multiple``
    processes in powers of two, so that an optimizer's state fits into each.
    """
    step = math.lcm(multiple, tp)
    return -(-size // step) * step


class Operation(Protocol):
    """From Hugging Face's tensors, put one below the other, to Megatron's whole one; and to the part of one process."""

    @property
    def axis(self) -> int | None: ...
    @property
    def splits(self) -> bool: ...
    def to_mcore(self, joined: Tensor, dims: Dims) -> Tensor: ...
    def to_hf(self, whole: Tensor, dims: Dims) -> Tensor: ...
    def sizes(self, joined: Tensor, dims: Dims) -> list[int]: ...
    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor: ...
    def unshard(self, shards: Sequence[Tensor]) -> Tensor: ...


class Whole:
    """The same numbers in every process of a tensor parallel group."""

    axis: int | None = None

    @property
    def splits(self) -> bool:
        """Whether each process of a tensor parallel group has other numbers."""
        return self.axis is not None

    def to_mcore(self, joined: Tensor, dims: Dims) -> Tensor:
        return joined

    def to_hf(self, whole: Tensor, dims: Dims) -> Tensor:
        return whole

    def sizes(self, joined: Tensor, dims: Dims) -> list[int]:
        """Rows of each of Hugging Face's tensors."""
        return [joined.shape[0]]

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        return whole if self.axis is None else whole.chunk(size, dim=self.axis)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0] if self.axis is None or len(shards) == 1 else torch.cat(list(shards), dim=self.axis)


class Columns(Whole):
    """Each process has some of the inputs (row parallel, as Megatron says it)."""

    axis = 1


class Rows(Whole):
    """Each process has some of the outputs (column parallel, as Megatron says it)."""

    axis = 0


class Vocabulary(Rows):
    """Zero rows up to a size that every process divides; they are cut off again."""

    def to_mcore(self, joined: Tensor, dims: Dims) -> Tensor:
        extra = dims.padded_vocab_size - joined.shape[0]
        return torch.cat([joined, joined.new_zeros(extra, *joined.shape[1:])]) if extra else joined

    def to_hf(self, whole: Tensor, dims: Dims) -> Tensor:
        return whole[: dims.vocab_size]


class QueryKeyValue(Rows):
    """((A + 2G) * H, ...): for each group its queries, then its key, then its value. Hugging Face: all q, all k, all v."""

    def to_mcore(self, joined: Tensor, dims: Dims) -> Tensor:
        parts = joined.split(self.sizes(joined, dims))
        return torch.cat([part.unflatten(0, (dims.groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def to_hf(self, whole: Tensor, dims: Dims) -> Tensor:
        grouped = whole.unflatten(0, (dims.groups, -1))
        parts = grouped.split([dims.heads // dims.groups * dims.head_dim, dims.head_dim, dims.head_dim], dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def sizes(self, joined: Tensor, dims: Dims) -> list[int]:
        return [dims.heads * dims.head_dim, dims.groups * dims.head_dim, dims.groups * dims.head_dim]


class GateUp(Whole):
    """The gate's rows, then those of the other half; a process has its rows of both."""

    splits = True

    def sizes(self, joined: Tensor, dims: Dims) -> list[int]:
        return [joined.shape[0] // 2, joined.shape[0] // 2]

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


OPERATIONS: dict[str, Any] = {
    "whole": Whole(),
    "columns": Columns(),
    "vocabulary": Vocabulary(),
    "qkv": QueryKeyValue(),
    "gate_up": GateUp(),
}
