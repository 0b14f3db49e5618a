"""Checkpoints of bitsandbytes, which quantizes and dequantizes itself: 4 bits of two number formats, or 8 bits.

With 4 bits ``weight`` (N * K / 2, 1) has two numbers a byte, and ``weight.absmax``, ``weight.quant_map`` and
``weight.quant_state.bitsandbytes__nf4`` (a JSON object as bytes) tell what they stand for, with ``weight.nested_absmax`` and
``weight.nested_quant_map`` if the scales are quantized too. With 8 bits ``weight`` (N, K) is int8 and ``SCB`` (N,) the largest
value of each row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swift import deps
from swift.errors import ModelError
from swift.model.quantized.base import BnbWeight, Settings, Weight

TYPES = ("nf4", "fp4")
markers = ("weight.absmax", "SCB")
least_zero = 0


def from_float(weight: Tensor, settings: Settings) -> BnbWeight:
    """``weight`` (N, K) as bitsandbytes quantizes it: to 4 bits in blocks of 64, or 8 bits with a scale for each row.

    ``settings.extra`` has ``quant_type`` ("nf4" or "fp4") and ``double_quant`` for 4 bits. The state keeps the precision of
    ``weight``, which is what a reader dequantizes to: give it that of the checkpoint. DependencyError without bitsandbytes.
    """
    functional = deps.require("bitsandbytes", extra="bnb").functional
    weight = weight.detach().contiguous()
    shape = (weight.shape[0], weight.shape[1])
    if settings.bits == 8:
        codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
        return BnbWeight(shape, 8, {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)})
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=bool(settings.extra["double_quant"]), quant_type=settings.extra["quant_type"]
    )
    parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return BnbWeight(shape, 4, {"weight": packed, **parts})


def unfit(weight_shape: tuple[int, int], settings: Settings) -> str | None:
    """See WeightFormat."""
    if settings.bits == 4 and weight_shape[0] * weight_shape[1] % 2:
        return "an odd number of weights does not fill bytes of two"
    return None


def write(name: str, weight: Weight, settings: Settings) -> dict[str, Tensor]:
    """See WeightFormat."""
    if not isinstance(weight, BnbWeight):
        raise ModelError(f"{name}: bnb holds what bitsandbytes quantized, not {type(weight).__name__}")
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in weight.tensors.items()}


def read(name: str, tensor: Callable[[str], Tensor], settings: Settings) -> BnbWeight:
    """See WeightFormat."""
    if settings.bits == 8:
        codes, largest = tensor(f"{name}.weight"), tensor(f"{name}.SCB")
        if codes.ndim != 2 or largest.shape != (codes.shape[0],):
            raise ModelError(f"{name}: SCB {tuple(largest.shape)} does not fit the weight {tuple(codes.shape)}")
        parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return BnbWeight((codes.shape[0], codes.shape[1]), 8, parts)
    names = ["weight", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{settings.extra['quant_type']}"]
    if settings.extra["double_quant"]:
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    parts = {part: tensor(f"{name}.{part}") for part in names}
    shape = tuple(_state(parts).shape)
    if len(shape) != 2 or parts["weight"].numel() * 2 != shape[0] * shape[1]:
        raise ModelError(f"{name}: {parts['weight'].numel()} bytes do not hold a weight {shape} of 4 bits")
    return BnbWeight((shape[0], shape[1]), 4, parts)


def dequantize(weight: BnbWeight) -> Tensor:
    """(N, K) float32."""
    functional = deps.require("bitsandbytes", extra="bnb").functional
    if weight.bits == 8:
        dense: Tensor = functional.int8_vectorwise_dequant(weight.tensors["weight"], weight.tensors["SCB"])
    else:
        dense = functional.dequantize_4bit(weight.tensors["weight"], _state(weight.tensors))
    return dense.float()


def config(settings: Settings) -> dict[str, Any]:
    """See WeightFormat."""
    found: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": settings.bits == 4,
        "load_in_8bit": settings.bits == 8,
        "llm_int8_skip_modules": list(settings.skipped) or None,
        "llm_int8_threshold": 6.0,
    }
    if settings.bits == 4:
        found |= {
            "bnb_4bit_quant_type": settings.extra["quant_type"],
            "bnb_4bit_use_double_quant": settings.extra["double_quant"],
            "bnb_4bit_compute_dtype": settings.extra.get("compute_dtype", "bfloat16"),
            "bnb_4bit_quant_storage": "uint8",
        }
    return found


def settings(config: dict[str, Any]) -> Settings:
    """See WeightFormat."""
    skipped = tuple(config.get("llm_int8_skip_modules") or ())
    if config.get("load_in_8bit"):
        return Settings("bnb", 8, strategy="channel", skipped=skipped)
    if not config.get("load_in_4bit"):
        raise ModelError("bitsandbytes with neither load_in_4bit nor load_in_8bit")
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in TYPES:
        raise ModelError(f"the number format {kind!r} of bitsandbytes is not supported", hint=f"supported are: {', '.join(TYPES)}")
    extra = {"quant_type": kind, "double_quant": bool(config.get("bnb_4bit_use_double_quant", False))}
    if "bnb_4bit_compute_dtype" in config:
        extra["compute_dtype"] = config["bnb_4bit_compute_dtype"]
    return Settings("bnb", 4, group_size=64, symmetric=True, skipped=skipped, extra=extra)


def _state(tensors: dict[str, Tensor]) -> Any:
    """bitsandbytes' own account of 4 bits; ModelError if it makes no sense of what is there."""
    functional = deps.require("bitsandbytes", extra="bnb").functional
    parts = {part.removeprefix("weight."): tensor for part, tensor in tensors.items() if part != "weight"}
    try:
        return functional.QuantState.from_dict(parts, tensors["weight"].device)
    except (ValueError, KeyError, AssertionError, UnicodeDecodeError, AttributeError) as problem:
        raise ModelError(f"the quant_state of bitsandbytes is damaged: {problem}") from problem
