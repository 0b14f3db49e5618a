"""Small whole numbers packed into words of 32 bits, as checkpoints hold them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(values: Tensor, bits: int) -> Tensor:
    """int32 words (..., n * bits / 32) of ``values`` (..., n) uint8 below 2^bits: the first value in the lowest bits, without gaps.

    32 values of 3 bits fill 3 words, so that two of them lie across a border. ``n * bits`` is a multiple of 32.
    """
    count = 8 // bits if 8 % bits == 0 else 8  # values that fill whole bytes
    parts = values.unflatten(-1, (-1, count))
    if 8 % bits == 0:
        octets: Tensor = parts[..., 0].clone()
        for place in range(1, count):
            octets |= parts[..., place] << (bits * place)
    else:
        wide = sum(parts[..., place].long() << (bits * place) for place in range(count))
        octets = torch.stack([(wide >> (8 * place)) & 255 for place in range(bits)], dim=-1).to(torch.uint8).flatten(-2)
    return octets.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The values (..., n) uint8 that ``pack`` made ``words`` of."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    mask = 2**bits - 1
    if 8 % bits == 0:
        return torch.stack([(octets >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    parts = octets.unflatten(-1, (-1, bits))
    wide = sum(parts[..., place].long() << (8 * place) for place in range(bits))
    return torch.stack([(wide >> (bits * place)) & mask for place in range(8)], dim=-1).to(torch.uint8).flatten(-2)


def pack_padded(values: Tensor, bits: int) -> Tensor:
    """Words (..., ceil(n * bits / 32)) of any number of values, with zeros behind the last."""
    count = values.shape[-1]
    return pack(F.pad(values, (0, -count % 32)), bits)[..., : -(-count * bits // 32)].contiguous()


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` values (..., count) uint8 of what ``pack_padded`` made."""
    return unpack(F.pad(words, (0, -words.shape[-1] % bits)), bits)[..., :count].contiguous()


def unpack_apart(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` values (..., count) uint8 of words with 32 // bits values each, whose last bits may be free."""
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    values: Tensor = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)
    return values.flatten(-2)[..., :count].contiguous()
