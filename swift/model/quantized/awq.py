"""Checkpoints of AWQ in the layout of its GEMM kernels.

``qweight`` (K, N / 8) and ``qzeros`` (G, N / 8) pack eight outputs into a word, in the order 0 2 4 6 1 3 5 7; ``scales`` (G, N)
in float16.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.model.quantized import grouped
from swift.model.quantized.base import GroupedWeight, Settings, Weight
from swift.model.quantized.words import pack, unpack

# N outputs, K inputs, G groups of inputs

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs of a word, from its lowest bits
BITS = 4
PARTS = ("qweight", "qzeros", "scales")
markers = ("qweight",)
least_zero = 0


def unfit(weight_shape: tuple[int, int], settings: Settings) -> str | None:
    """See WeightFormat."""
    outputs, inputs = weight_shape
    if outputs % 8:
        return f"{outputs} outputs are no multiple of 8"
    return grouped.unfit(inputs, settings)


def write(name: str, weight: Weight, settings: Settings) -> dict[str, Tensor]:
    """See WeightFormat."""
    found = grouped.of(name, weight)
    if found.bits != BITS or found.groups is not None:
        raise ModelError(f"{name}: awq holds 4 bits in groups of inputs that follow each other")
    return {
        f"{name}.qweight": _pack(found.codes),
        f"{name}.qzeros": _pack(found.zeros),
        f"{name}.scales": grouped.half(name, found.scales).T.contiguous(),
    }


def read(name: str, tensor: Callable[[str], Tensor], settings: Settings) -> GroupedWeight:
    """See WeightFormat."""
    words, zeros, scales = (tensor(f"{name}.{part}") for part in PARTS)
    outputs = scales.shape[-1]
    if words.ndim != 2 or words.shape[1] * 8 != outputs or zeros.shape != (scales.shape[0], words.shape[1]):
        raise ModelError(f"{name}: qweight {tuple(words.shape)} and qzeros {tuple(zeros.shape)} do not fit scales {tuple(scales.shape)}")
    return grouped.make(name, _unpack(words), scales.T, _unpack(zeros), BITS)


def config(settings: Settings) -> dict[str, Any]:
    """See WeightFormat."""
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(settings.skipped),
    }


def settings(config: dict[str, Any]) -> Settings:
    """See WeightFormat."""
    bits = config.get("bits", config.get("w_bit"))
    if bits != BITS:
        raise ModelError(f"awq with {bits} bits is not supported", hint="4 are")
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm":
        raise ModelError(f"the layout {version!r} of awq is not supported", hint="gemm is")
    if not config.get("zero_point", True):
        raise ModelError("awq without zero points is not supported")
    return Settings(
        method="awq",
        bits=BITS,
        group_size=config.get("group_size", config.get("q_group_size", 128)),
        symmetric=False,
        skipped=tuple(config.get("modules_to_not_convert") or ()),
    )


def _pack(values: Tensor) -> Tensor:
    """Words (n, N / 8) of ``values`` (N, n)."""
    return pack(values.T.unflatten(1, (-1, 8))[:, :, list(ORDER)].flatten(1), BITS)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of ``_pack``."""
    inverse = torch.tensor(ORDER, device=words.device).argsort()
    return unpack(words, BITS).unflatten(1, (-1, 8))[:, :, inverse].flatten(1).T.contiguous()
