"""Small whole numbers packed into words of 32 bits, as checkpoints hold them."""

import torch
from torch import Tensor


def pack(values: Tensor, bits: int) -> Tensor:
    """int32 words (..., n * bits / 32) of ``values`` (..., n) uint8 below 2^bits: the first value in the lowest bits, without gaps.

    32 values of 3 bits fill 3 words, so that two of them lie across a border. ``n * bits`` is a multiple of 32.
    """
    if 8 % bits == 0:
        parts = values.unflatten(-1, (-1, 8 // bits))
        octets = parts[..., 0].clone()
        for place in range(1, 8 // bits):
            octets |= parts[..., place] << (bits * place)
    else:
        single = (values.unsqueeze(-1) >> _range(bits, values)) & 1
        octets = (single.flatten(-2).unflatten(-1, (-1, 8)) << _range(8, values)).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The values (..., n) uint8 that ``pack`` made ``words`` of."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    if 8 % bits == 0:
        return ((octets.unsqueeze(-1) >> (_range(8 // bits, octets) * bits)) & (2**bits - 1)).flatten(-2)
    single = ((octets.unsqueeze(-1) >> _range(8, octets)) & 1).flatten(-2).unflatten(-1, (-1, bits))
    return (single << _range(bits, octets)).sum(-1, dtype=torch.uint8)


def pack_apart(values: Tensor, bits: int) -> Tensor:
    """int32 words (..., ceil(n / p)) with p = 32 // bits values each, and zeros behind the last."""
    each = 32 // bits
    count = values.shape[-1]
    padded = values.new_zeros(*values.shape[:-1], -(-count // each) * each, dtype=torch.int64)
    padded[..., :count] = values
    words = (padded.unflatten(-1, (-1, each)) << (torch.arange(each, device=values.device) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_apart(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` values (..., count) uint8 of what ``pack_apart`` made."""
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :count].contiguous()


def _range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.uint8)
