"""Grids of few bits: scale and zero of each group of weights by search, and rounding to them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from swift.errors import ConfigError

# N outputs, K inputs, G groups of S inputs that follow each other

CHUNK = 1 << 17  # weights searched at once: what a pass reads and writes stays in the cache of a core
SMALLEST, LARGEST = 2.0**-20, 65504.0  # scales: below, float16 has less than 4 bits; above, it has nothing
SHRUNKEN = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    3: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.57),
    4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.73, 0.65),
    8: (1.0, 0.98),
}
REFINEMENTS = 2


def find_grid(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, importance: Tensor | None = None, *, least_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Scales (N, G) float32 and zeros (N, G) uint8 of the groups of ``weight`` (N, K), as in GroupedWeight.

    They are the best found for the squared error of rounding to the nearest, each input weighted by ``importance`` (K,).
    Tried are ranges from the whole one down, with a zero on both sides of the exact one unless ``symmetric``; then, with the
    codes of the best, the scale of least squares. Scales are values that float16 holds, zeros are at least ``least_zero`` (see
    WeightFormat). ConfigError if groups of ``group_size`` (-1: a row) do not fill the rows.
    """
    count = num_groups(weight.shape[1], group_size)
    weighting = _weighting(importance, count, weight)
    rows = max(1, CHUNK // weight.shape[1])
    found = [_search(_grouped(part, count), bits, symmetric, weighting, least_zero) for part in weight.split(rows)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def num_groups(inputs: int, group_size: int) -> int:
    """Groups of a row of ``inputs`` weights; ConfigError if they do not fill it."""
    if group_size == -1:
        return 1
    if group_size < 1 or inputs % group_size:
        raise ConfigError(f"groups of {group_size} weights do not fill rows of {inputs}", hint="choose another --group_size")
    return inputs // group_size


def round_to(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes (N, K) uint8 of ``weight`` on a grid (N, G)."""
    steps = _grouped(weight, scales.shape[1]) / scales.unsqueeze(-1)
    return steps.round_().add_(zeros.unsqueeze(-1)).clamp_(0, 2**bits - 1).to(torch.uint8).flatten(1)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid that the range of each group gives without a search: what others are measured against."""
    grouped = _grouped(weight, num_groups(weight.shape[1], group_size))
    zeros = next(_zeros(grouped, bits, symmetric, 0))
    return _representable(_whole(grouped, zeros, bits)), zeros.to(torch.uint8)


def _grouped(weight: Tensor, count: int) -> Tensor:
    """(N, G, S) float32."""
    return weight.float().reshape(len(weight), count, -1)


def _weighting(importance: Tensor | None, count: int, weight: Tensor) -> Tensor:
    """Importance as (G, S) with a mean of about 1, nowhere quite 0: what no input reached is rounded well too."""
    if importance is None:
        return torch.ones(count, weight.shape[1] // count, device=weight.device)
    importance = importance.float()
    mean = importance.mean()
    return (importance / mean if mean > 0 else torch.ones_like(importance)).add(1e-6).reshape(count, -1)


def _search(weight: Tensor, bits: int, symmetric: bool, weighting: Tensor, least_zero: int) -> tuple[Tensor, Tensor]:
    """Of weights (N, G, S): scales and zeros (N, G)."""
    buffer = torch.empty_like(weight)
    best = torch.full(weight.shape[:2], torch.inf, device=weight.device)
    scales, zeros = torch.ones_like(best), torch.zeros_like(best)

    def attempt(scale: Tensor, zero: Tensor) -> None:
        nonlocal best
        _codes(weight, scale, zero, bits, buffer)
        gap = buffer.mul_(scale.unsqueeze(-1)).sub_(weight)
        error = torch.linalg.vecdot(gap * weighting, gap)
        better = error < best
        best = torch.where(better, error, best)
        scales.copy_(torch.where(better, scale, scales))
        zeros.copy_(torch.where(better, zero, zeros))

    for zero in _zeros(weight, bits, symmetric, least_zero):
        whole = _whole(weight, zero, bits)
        for ratio in SHRUNKEN[bits]:
            attempt(_representable(whole * ratio), zero)
    for _ in range(REFINEMENTS):
        codes = _codes(weight, scales, zeros, bits, buffer)
        seen = codes * weighting
        fitted = torch.linalg.vecdot(seen, weight) / torch.linalg.vecdot(seen, codes)
        attempt(_representable(torch.where(fitted > 0, fitted, scales)), zeros)
    return scales, zeros.to(torch.uint8)


def _zeros(weight: Tensor, bits: int, symmetric: bool, least: int) -> Iterator[Tensor]:
    """Zeros (N, G) worth a trial, the nearest to the exact one first."""
    if symmetric:
        yield torch.full(weight.shape[:2], 2.0 ** (bits - 1), device=weight.device)
        return
    below, above = weight.amin(-1).clamp_(max=0), weight.amax(-1).clamp_(min=0)
    exact = (-below / (above - below).clamp_min_(torch.finfo(torch.float32).tiny)) * (2**bits - 1)
    nearest = exact.round().clamp_(least, 2**bits - 1)
    yield nearest
    yield (nearest + torch.where(exact < nearest, -1.0, 1.0)).clamp_(least, 2**bits - 1)


def _whole(weight: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The least scale (N, G) with which nothing is clipped, at sides of zero that have codes."""
    below, above = -weight.amin(-1), weight.amax(-1)
    top = 2**bits - 1 - zero
    return torch.maximum(
        torch.where(zero > 0, below / zero, 0.0),
        torch.where(top > 0, above / top, 0.0),
    )


def _representable(scale: Tensor) -> Tensor:
    """The nearest scale that float16 holds."""
    return scale.clamp(SMALLEST, LARGEST).half().float()


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, out: Tensor) -> Tensor:
    """Codes less zero, as floats in ``out``."""
    torch.div(weight, scale.unsqueeze(-1), out=out).round_()
    low, high = -zero.unsqueeze(-1), (2**bits - 1 - zero).unsqueeze(-1)
    return out.clamp_(low, high)
