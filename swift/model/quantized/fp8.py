"""Checkpoints in FP8 as DeepSeek and transformers write them: ``weight`` (N, K) in e4m3 and ``weight_scale_inv`` for blocks.

Those of other tools with ``weight_scale`` for the tensor and ``input_scale`` are read too.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from swift.errors import ModelError
from swift.model.quantized import scaled
from swift.model.quantized.base import ScaledWeight, Settings, Weight

markers = ("weight_scale_inv", "weight_scale")
least_zero = 0


def unfit(weight_shape: tuple[int, int], settings: Settings) -> str | None:
    """See WeightFormat."""
    return scaled.unfit(weight_shape)


def write(name: str, weight: Weight, settings: Settings) -> dict[str, Tensor]:
    """See WeightFormat."""
    found = scaled.of(name, weight)
    if found.codes.dtype != scaled.FP8 or found.block != scaled.BLOCK or found.input_scale is not None:
        raise ModelError(f"{name}: this format holds e4m3 in blocks of {scaled.BLOCK} x {scaled.BLOCK} with dynamic activations")
    return {f"{name}.weight": found.codes.contiguous(), f"{name}.weight_scale_inv": found.scales.float().contiguous()}


def read(name: str, tensor: Callable[[str], Tensor], settings: Settings) -> ScaledWeight:
    """See WeightFormat."""
    codes = tensor(f"{name}.weight")
    if settings.strategy == "block":
        return scaled.make(name, codes, tensor(f"{name}.weight_scale_inv"), settings.extra["block"], None)
    scales = scaled.optional(tensor, f"{name}.weight_scale_inv")
    static = None
    if settings.activations == "static":
        static = scaled.optional(tensor, f"{name}.input_scale")
        static = tensor(f"{name}.activation_scale") if static is None else static
    return scaled.make(name, codes, tensor(f"{name}.weight_scale") if scales is None else scales, None, static)


def config(settings: Settings) -> dict[str, Any]:
    """See WeightFormat."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [scaled.BLOCK, scaled.BLOCK],
        "modules_to_not_convert": list(settings.skipped) or None,
    }


def settings(config: dict[str, Any]) -> Settings:
    """See WeightFormat."""
    if config.get("fmt", "e4m3") != "e4m3":
        raise ModelError(f"fp8 of the kind {config['fmt']!r} is not supported", hint="e4m3 is")
    if config.get("expert_dtype", "fp8") != "fp8":
        raise ModelError(f"experts in {config['expert_dtype']!r} are not supported")
    activations = config.get("activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        raise ModelError(f"fp8 with the activation_scheme {activations!r} is not supported", hint="dynamic and static are")
    block = config.get("weight_block_size")
    if block is not None and (not isinstance(block, list) or len(block) != 2 or block[0] != block[1] or not int(block[0]) > 0):
        raise ModelError(f"fp8 in blocks of {block} is not supported", hint="square ones are, as [128, 128]")
    return Settings(
        method="fp8",
        bits=8,
        strategy="tensor" if block is None else "block",
        activations=activations,
        skipped=tuple(config.get("modules_to_not_convert") or config.get("ignored_layers") or ()),
        extra={} if block is None else {"block": int(block[0])},
    )
