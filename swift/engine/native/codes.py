"""Weights that a checkpoint has in few bits already, packed for the kernels as they are, without rounding them again."""

import torch
from torch import Tensor

from swift.model.quantized.base import GroupedWeight, ScaledWeight

# N outputs, K inputs, P panels of R outputs each, G groups of inputs

WIDTHS = {"int4_g128": 128, "int4_g64": 64, "int4_g32": 32}  # inputs of a group of the formats with scales of 32 bits, widest first
INT8_WIDTH = 64


def format_of_codes(weight: GroupedWeight | ScaledWeight) -> str | None:
    """The format that holds ``weight`` exactly, or None: fp8, an order of inputs, 8 bits with zero points, groups of no known width."""
    inputs = weight.codes.shape[1]
    if isinstance(weight, ScaledWeight):
        return "int8" if weight.codes.dtype == torch.int8 and weight.block is None and inputs % INT8_WIDTH == 0 else None
    width = inputs // weight.scales.shape[1]
    if weight.groups is not None:
        return None
    if weight.bits == 8:
        return "int8" if weight.symmetric and width % INT8_WIDTH == 0 else None
    return next((name for name, size in WIDTHS.items() if width % size == 0), None) if weight.bits <= 4 else None


def pack_codes(weight: GroupedWeight | ScaledWeight, format: str, width: int) -> Tensor:
    """What kernels/quantized.cpp reads: panels (P, G, bytes) of ``width`` outputs, for ``format`` of ``format_of_codes``."""
    codes, scales = weight.codes, weight.scales.float()
    count, inputs = codes.shape
    size = WIDTHS.get(format, INT8_WIDTH)
    scales = scales.expand(count, -1).repeat_interleave(inputs // size // scales.shape[1], 1)
    if format == "int8":
        whole = (codes.to(torch.int16) - 128).to(torch.int8) if isinstance(weight, GroupedWeight) else codes
        return torch.cat([_bytes(in_panels(scales, width)).view(torch.int8), in_pairs(_groups(whole, size, width)).flatten(2)], dim=2)
    assert isinstance(weight, GroupedWeight)
    zeros = weight.zeros.float().repeat_interleave(inputs // size // weight.zeros.shape[1], 1)
    heads = [_bytes(in_panels(part, width)) for part in (scales, -zeros * scales)]
    return torch.cat([*heads, in_nibbles(_groups(codes, size, width)).flatten(2)], dim=2)


def in_panels(values: Tensor, width: int) -> Tensor:
    """(P, n, R) of ``values`` (N, n), with zeros for outputs that are not there."""
    count, size = values.shape
    panels = -(-count // width)
    if count % width:
        padded = values.new_zeros(panels * width, size)
        padded[:count] = values
        values = padded
    panels_PRn: Tensor = values.unflatten(0, (panels, width))
    return panels_PRn.transpose(1, 2)


def in_pairs(groups_PGKR: Tensor) -> Tensor:
    """(P, G, K / 2, R, 2): two inputs of an output side by side."""
    pairs: Tensor = groups_PGKR.unflatten(2, (-1, 2))
    return pairs.transpose(3, 4)


def in_nibbles(groups_PGKR: Tensor) -> Tensor:
    """(P, G, K / 4, R, 2) bytes of numbers below 16: two pairs of inputs, one in the low and one in the high bits."""
    pairs: Tensor = in_pairs(groups_PGKR).unflatten(2, (-1, 2))
    return pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4


def out_of_pairs(pairs: Tensor) -> Tensor:
    """What ``in_pairs`` was made of."""
    return pairs.transpose(3, 4).flatten(2, 3)


def out_of_nibbles(both: Tensor) -> Tensor:
    """What ``in_nibbles`` was made of."""
    return out_of_pairs(torch.stack([both & 15, both >> 4], dim=3).flatten(2, 3))


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _groups(codes: Tensor, size: int, width: int) -> Tensor:
    """(P, G, K, R)."""
    groups: Tensor = in_panels(codes, width).unflatten(1, (-1, size))
    return groups
