"""What the formats of grouped weights share: checks, and how their parts are stored."""

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.model.quantized.base import GroupedWeight, Settings, Weight

# N outputs, K inputs, G groups of inputs


def unfit(inputs: int, settings: Settings) -> str | None:
    """Why groups of the settings' size do not make up ``inputs``, or None."""
    if settings.group_size > 0 and inputs % settings.group_size:
        return f"{inputs} inputs are no multiple of groups of {settings.group_size}"
    return None


def of(name: str, weight: Weight) -> GroupedWeight:
    """``weight``, which has groups; ModelError if it does not."""
    if not isinstance(weight, GroupedWeight):
        raise ModelError(f"{name}: this format holds whole numbers in groups, not {type(weight).__name__}")
    return weight


def half(name: str, scales: Tensor) -> Tensor:
    """``scales`` in float16; ModelError if that changes them."""
    stored = scales.half()
    if not torch.equal(stored.to(scales.dtype), scales):
        raise ModelError(f"{name}: scales that float16 does not hold")
    return stored


def make(name: str, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, groups: Tensor | None = None) -> GroupedWeight:
    """The weight of what a file holds: ``codes`` (N, K), ``scales`` and ``zeros`` (N, G). ModelError if they do not fit."""
    outputs, inputs = codes.shape
    count = scales.shape[1] if scales.ndim == 2 else 0
    if scales.shape != (outputs, count) or not count or zeros.shape != scales.shape:
        raise ModelError(f"{name}: scales {tuple(scales.shape)} do not fit {outputs} outputs of {inputs} inputs")
    if not torch.isfinite(scales).all():
        raise ModelError(f"{name}: scales that are not finite")
    if groups is not None:
        groups = groups.long()
        if groups.shape != (inputs,) or int(groups.min()) < 0 or int(groups.max()) >= count:
            raise ModelError(f"{name}: g_idx names groups that are not there")
        if inputs % count == 0 and torch.equal(groups, torch.arange(inputs, device=groups.device) // (inputs // count)):
            groups = None
    if groups is None and inputs % count:
        raise ModelError(f"{name}: {inputs} inputs are no multiple of {count} groups")
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    return GroupedWeight(codes, scales.float().contiguous(), zeros.contiguous(), bits, symmetric, groups)
