"""Weights that are numbers: one pass over the files of a model, a part of a tensor at a time."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.model.artifact import ModelFolder

_PART = 2**24  # numbers that are read at once


def refuse_not_finite(model: ModelFolder) -> None:
    """ModelError that names the first tensor with a NaN or an infinity: whatever is made of it would compute NaN."""
    for file in model.weight_files:
        for name, part in _parts(file):
            if not is_finite(part):
                raise ModelError(
                    f"{model.name}: {name} in {file.name} holds NaN or infinity",
                    hint="the training that made it diverged, or the file is damaged: take an earlier checkpoint, or fetch it again",
                )


def is_finite(values: Tensor) -> bool:
    """Whether all ``values`` are numbers. Their smallest and largest tell, without a second tensor; NaN is both."""
    if values.numel() == 0 or not values.is_floating_point():
        return True
    if values.element_size() == 1:
        values = values.float()
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _parts(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, of large ones some rows at a time."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it has no iterator
            rows = opened.get_slice(name)
            shape = rows.get_shape()
            if not shape:
                yield name, opened.get_tensor(name)
                continue
            step = max(1, _PART * shape[0] // max(1, math.prod(shape)))
            for begin in range(0, shape[0], step):
                yield name, rows[begin : begin + step]
