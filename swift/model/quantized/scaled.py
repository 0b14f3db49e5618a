"""What the formats of weights in 8 bits share: checks, and the tensors of the file."""

from collections.abc import Callable

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.model.quantized.base import ScaledWeight, Weight

# N outputs, K inputs

BLOCK = 128
FP8 = torch.float8_e4m3fn


def unfit(weight_shape: tuple[int, int]) -> str | None:
    """Why a weight (N, K) cannot have scales for blocks of 128 x 128, or None.

    Readers find a block's size by dividing, so that a last block that is not whole shifts all others.
    """
    for count, what in zip(weight_shape, ("outputs", "inputs"), strict=True):
        if count > BLOCK and count % BLOCK:
            return f"{count} {what} are no multiple of blocks of {BLOCK}"
    return None


def of(name: str, weight: Weight) -> ScaledWeight:
    """``weight``, which has 8 bits and scales; ModelError if it does not."""
    if not isinstance(weight, ScaledWeight):
        raise ModelError(f"{name}: this format holds 8 bits with scales, not {type(weight).__name__}")
    return weight


def optional(tensor: Callable[[str], Tensor], name: str) -> Tensor | None:
    """The tensor called ``name``, or None if the file does not have it."""
    try:
        return tensor(name)
    except KeyError:
        return None


def make(name: str, codes: Tensor, scales: Tensor, block: int | None, input_scale: Tensor | None) -> ScaledWeight:
    """The weight of what a file holds: ``codes`` (N, K) and ``scales`` of any number of dimensions. ModelError if they do not fit."""
    if codes.ndim != 2 or codes.dtype not in (FP8, torch.int8):
        raise ModelError(f"{name}: weight {tuple(codes.shape)} {codes.dtype} is no matrix of fp8 (e4m3) or int8")
    outputs, inputs = codes.shape
    scales = _as_float(scales)
    if block is None:
        scales = scales.reshape(-1, 1)
        wanted = ((1, 1), (outputs, 1))
    else:
        wanted = ((-(-outputs // block), -(-inputs // block)),) * 2
    if tuple(scales.shape) not in wanted:
        raise ModelError(f"{name}: scales {tuple(scales.shape)} do not fit a weight of {outputs} outputs and {inputs} inputs")
    if not torch.isfinite(scales).all():
        raise ModelError(f"{name}: scales that are not finite")
    if input_scale is not None and (input_scale.numel() != 1 or not float(input_scale.float()) > 0):
        raise ModelError(f"{name}: input_scale {tuple(input_scale.shape)} is not one positive number")
    return ScaledWeight(codes, scales.contiguous(), block, None if input_scale is None else float(input_scale.float()))


def _as_float(scales: Tensor) -> Tensor:
    """float32; bytes are the exponents of powers of two (ue8m0)."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
