"""What is quantized and how, decided from the shapes alone: the size of groups, the layers that stay as they are."""

import math
import re
from collections import Counter
from typing import Any

from torch import nn

from swift import console
from swift.config.export import ExportConfig
from swift.errors import ConfigError, ModelError
from swift.model.load import checkpoint_dtype
from swift.model.quantized import FORMATS
from swift.model.quantized.base import Settings, WeightFormat
from swift.quantize.base import Plan
from swift.quantize.skeleton import Skeleton

LEAST_GROUP = 8


def make_plan(skeleton: Skeleton, config: ExportConfig) -> Plan:
    """ConfigError for a pattern of --quant_skip that fits nothing, ModelError if no layer can be quantized."""
    shapes = linear_shapes(skeleton)
    if joined := joined_weights(skeleton):
        console.notice(f"{len(joined)} weights of experts in one tensor stay as they are, the first is {joined[0]}")
    if not shapes:
        raise ModelError(f"{skeleton.folder.name}: its blocks have no linear layers to quantize")
    skipped = _asked_for(shapes, config.quant_skip)
    rest = {name: shape for name, shape in shapes.items() if name not in skipped}
    group_size = config.group_size
    if config.quant_method in ("gptq", "awq"):
        group_size = fitting_group(rest, config.group_size)
        if group_size != config.group_size:
            widths = ", ".join(str(width) for width in sorted({shape[1] for shape in rest.values()}))
            console.notice(f"groups of {group_size} inputs instead of {config.group_size}: the layers have {widths} inputs")
    settings = _settings(skeleton, config, group_size)
    form: WeightFormat = FORMATS.get(config.quant_format or "")
    for name, shape in rest.items():
        if shape[0] == 1:
            skipped[name] = "a single output is a gate, which engines read as it was"
        elif group_size > 0 and settings.strategy == "group" and shape[1] % group_size:
            skipped[name] = f"its {shape[1]} inputs are no multiple of the group of {group_size}"
        elif (why := form.unfit(shape, settings)) is not None:
            skipped[name] = why
    if len(skipped) == len(shapes):
        raise ModelError(f"{skeleton.folder.name}: no layer can be quantized: {next(iter(skipped.values()))}")
    for why, number in Counter(skipped.values()).items():
        first = next(name for name, reason in skipped.items() if reason == why)
        console.notice(f"{number} layers stay as they are, the first is {first}: {why}")
    return Plan(settings, skipped)


def linear_shapes(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """{layer, as it is called in the files: (outputs, inputs)} of all linear layers of the blocks."""
    shapes = {}
    for index in range(len(skeleton)):
        for name, module in skeleton.empty_block(index).named_modules():
            if type(module) is nn.Linear:
                shapes[skeleton.key_of(index, name)] = (module.out_features, module.in_features)
    return shapes


def joined_weights(skeleton: Skeleton) -> list[str]:
    """Weights of experts in one tensor, as they are called in the files, that cannot be told apart there."""
    return [
        skeleton.keys[f"{skeleton.place}.{index}.{name}"]
        for index in range(len(skeleton))
        for name, parameter in skeleton.empty_block(index).named_parameters()
        if parameter.dim() == 3 and not name.endswith(".weight")
    ]


def fitting_group(shapes: dict[str, tuple[int, int]], wanted: int) -> int:
    """``wanted``, or the largest power of two below it that divides the inputs of all layers; if there is none, of most."""
    if wanted == -1:
        return -1
    widths = [shape[1] for shape in shapes.values()]
    common = math.gcd(*widths)
    if common % wanted == 0:
        return wanted
    size = 1 << (wanted.bit_length() - 1)
    while size >= LEAST_GROUP:
        if common % size == 0:
            return size
        size //= 2
    usual = math.gcd(*[width for width, _ in Counter(widths).most_common(2)])
    return next((size for size in (wanted, 128, 64, 32, 16, 8) if size <= wanted and usual % size == 0), -1)


def _asked_for(shapes: dict[str, tuple[int, int]], patterns: list[str]) -> dict[str, str]:
    skipped: dict[str, str] = {}
    for pattern in patterns:
        try:
            fits = [name for name in shapes if re.search(pattern, name)]
        except re.error as problem:
            raise ConfigError(f"--quant_skip {pattern!r} is no regular expression: {problem}") from None
        if not fits:
            raise ConfigError(f"--quant_skip {pattern!r} is in the name of no layer", hint=f"layers are called {next(iter(shapes))}")
        skipped |= dict.fromkeys(fits, f"--quant_skip {pattern}")
    return skipped


def _settings(skeleton: Skeleton, config: ExportConfig, group_size: int) -> Settings:
    method = str(config.quant_method)
    bits = int(config.quant_bits or 4)
    if method in ("fp8", "int8"):
        return Settings(method, bits, strategy=str(config.quant_strategy), activations=config.quant_activations)
    if method == "bnb":
        stored = str(checkpoint_dtype(skeleton.folder.path)).removeprefix("torch.")
        extra: dict[str, Any] = {"compute_dtype": config.bnb_4bit_compute_dtype or config.torch_dtype or stored}
        if bits == 4:
            extra |= {"quant_type": config.bnb_4bit_quant_type, "double_quant": config.bnb_4bit_use_double_quant}
        return Settings(method, bits, strategy="bnb", extra=extra)
    symmetric = config.sym if method == "gptq" else False
    return Settings(method, bits, group_size, symmetric, desc_act=config.desc_act, extra={"damp_percent": config.damp_percent})
