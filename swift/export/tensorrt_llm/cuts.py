"""What of a tensor each rank of tensor parallelism holds. Works on the device meta too, where it gives shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor

# R ranks; rows of a weight (N, K) are outputs


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer, and the width of one."""

    query: int
    key_value: int
    width: int


def whole(tensors: list[Tensor], ranks: int, heads: Heads) -> list[Tensor]:
    """The same for every rank."""
    return [torch.cat(tensors)] * ranks


def outputs(tensors: list[Tensor], ranks: int, heads: Heads) -> list[Tensor]:
    """(N / R, ...) rows."""
    return list(torch.cat(tensors).chunk(ranks))


def inputs(tensors: list[Tensor], ranks: int, heads: Heads) -> list[Tensor]:
    """(N, K / R) columns."""
    return list(torch.cat(tensors).chunk(ranks, dim=1))


def vocabulary(tensors: list[Tensor], ranks: int, heads: Heads) -> list[Tensor]:
    """(ceil(V / R), K) rows, the last of them zeros where V is no multiple of R."""
    (table,) = tensors
    missing = -len(table) % ranks
    if missing:
        table = torch.cat([table, table.new_zeros(missing, *table.shape[1:])])
    return list(table.chunk(ranks))


def attention(tensors: list[Tensor], ranks: int, heads: Heads) -> list[Tensor]:
    """Rows of the query heads, key heads and value heads of a rank, in this order.

    ``tensors`` are three, or one that holds them joined. Where ranks outnumber the key/value heads, each of these is repeated,
    so that a rank has the one that its query heads belong to.
    """
    sizes = [heads.query * heads.width, heads.key_value * heads.width, heads.key_value * heads.width]
    query, key, value = tensors if len(tensors) == 3 else tensors[0].split(sizes)
    times = max(1, ranks // heads.key_value)
    if times > 1:
        key, value = (part.unflatten(0, (heads.key_value, heads.width)).repeat_interleave(times, 0).flatten(0, 1) for part in (key, value))
    return [torch.cat(three) for three in zip(query.chunk(ranks), key.chunk(ranks), value.chunk(ranks), strict=True)]


def up_gate(tensors: list[Tensor], ranks: int, heads: Heads) -> list[Tensor]:
    """(2 N / R, K): rows of the second half (up), then those of the first (gate)."""
    gate, up = torch.cat(tensors).chunk(2)
    return [torch.cat(pair) for pair in zip(up.chunk(ranks), gate.chunk(ranks), strict=True)]


CUTS = {"whole": whole, "outputs": outputs, "inputs": inputs, "vocabulary": vocabulary, "heads": attention, "up_gate": up_gate}
