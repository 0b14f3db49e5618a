"""Checkpoints of compressed-tensors: whole numbers in groups packed into words (pack-quantized), and int8 or FP8 with scales.

Its values have a sign: a stored word holds them plus 2^(bits - 1), which are the codes of a GroupedWeight. ``weight_packed``
(N, ceil(K * bits / 32)) packs along the inputs, ``weight_zero_point`` (ceil(N * bits / 32), G) along the outputs; ``weight_scale``
is (N, G), ``weight_shape`` (2,). Files of versions before 0.20 may have an order of inputs, ``weight_g_idx`` (K,), and 32 // bits
values in a word. With 8 bits and scales there are ``weight``, ``weight_scale`` and ``input_scale``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.model.quantized import grouped, scaled
from swift.model.quantized.base import GroupedWeight, ScaledWeight, Settings, Weight
from swift.model.quantized.words import pack_padded, unpack_apart, unpack_padded

# N outputs, K inputs, G groups of inputs

PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
WHOLE = {"fp8": FLOAT, "int8": INT}  # by the method
markers = ("weight_packed", "weight_scale")
least_zero = 0


def unfit(weight_shape: tuple[int, int], settings: Settings) -> str | None:
    """See WeightFormat."""
    if settings.strategy == "block":
        return scaled.unfit(weight_shape)
    return grouped.unfit(weight_shape[1], settings) if settings.method not in WHOLE else None


def write(name: str, weight: Weight, settings: Settings) -> dict[str, Tensor]:
    """See WeightFormat."""
    if isinstance(weight, GroupedWeight):
        return _write_groups(name, weight)
    found = scaled.of(name, weight)
    scales = found.scales.float().contiguous()
    is_one = settings.strategy == "tensor"
    tensors = {f"{name}.weight": found.codes.contiguous(), f"{name}.weight_scale": scales.flatten() if is_one else scales}
    if settings.activations == "static":
        if found.input_scale is None:
            raise ModelError(f"{name}: static activations need the scale of the inputs")
        tensors[f"{name}.input_scale"] = torch.tensor([found.input_scale])
    return tensors


def read(name: str, tensor: Callable[[str], Tensor], settings: Settings) -> GroupedWeight | ScaledWeight:
    """See WeightFormat."""
    if settings.extra["format"] == PACKED:
        return _read_groups(name, tensor, settings)
    codes, scales = tensor(f"{name}.weight"), tensor(f"{name}.weight_scale")
    if settings.strategy == "group":
        if codes.dtype != torch.int8 or codes.ndim != 2:
            raise ModelError(f"{name}: weight {tuple(codes.shape)} {codes.dtype} is no matrix of int8")
        half = 2 ** (settings.bits - 1)
        zeros = torch.full(scales.shape, half, dtype=torch.uint8)
        return grouped.make(name, (codes.to(torch.int16) + half).to(torch.uint8), scales, zeros, settings.bits)
    static = tensor(f"{name}.input_scale") if settings.activations == "static" else None
    return scaled.make(name, codes, scales, settings.extra.get("block"), static)


def config(settings: Settings) -> dict[str, Any]:
    """See WeightFormat: the fields of the package's QuantizationConfig."""
    whole = settings.method in WHOLE
    form = WHOLE.get(settings.method, PACKED)
    kind = "float" if settings.method == "fp8" else "int"
    strategy = settings.strategy if whole else "channel" if settings.group_size < 0 else "group"
    weights: dict[str, Any] = {
        "num_bits": settings.bits,
        "type": kind,
        "symmetric": settings.symmetric,
        "strategy": strategy,
        "group_size": settings.group_size if strategy == "group" else None,
        "block_structure": [scaled.BLOCK, scaled.BLOCK] if strategy == "block" else None,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": _inputs(settings, kind) if whole else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(settings.skipped),
        "config_groups": {"group_0": group | {"output_activations": None, "format": form}},
    }


def settings(config: dict[str, Any]) -> Settings:
    """See WeightFormat. Scales of a quantized cache are passed over: it is kept as it is computed."""
    for part in ("transform_config", "sparsity_config"):
        if config.get(part) and (part != "sparsity_config" or config[part].get("format") not in (None, "dense")):
            raise ModelError(f"compressed-tensors with a {part} is not supported")
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, dict) and group.get("weights")]
    if not groups or any(group["weights"] != groups[0]["weights"] for group in groups):
        raise ModelError(f"compressed-tensors with {len(groups) or 'no'} kinds of weights is not supported", hint="with one kind it is")
    weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
    form, bits, kind = groups[0].get("format") or config.get("format"), weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy") or ("group" if (weights.get("group_size") or -1) > 0 else "tensor")
    symmetric = bool(weights.get("symmetric", True))
    block = weights.get("block_structure")
    is_whole = symmetric and bits == 8 and strategy in ("tensor", "channel")
    is_known = {
        PACKED: kind == "int" and bits in range(2, 9) and strategy in ("group", "channel"),
        INT: kind == "int" and (is_whole or (symmetric and strategy == "group" and bits in (4, 8))),
        FLOAT: kind == "float" and (is_whole or (symmetric and bits == 8 and strategy == "block")),
        NAIVE: is_whole,
    }.get(str(form), False)
    if not is_known or (strategy == "block" and (not isinstance(block, list) or len(block) != 2 or block[0] != block[1])):
        balance = "symmetric" if symmetric else "asymmetric"
        raise ModelError(
            f"compressed-tensors of the form {form} with {bits} bits ({kind}, {balance}, scales for each {strategy}) is not supported",
            hint="whole numbers of 2 to 8 bits in groups are, and int8 and FP8 with scales",
        )
    extra: dict[str, Any] = {"format": form}
    if strategy == "block":
        extra["block"] = int(block[0])
    return Settings(
        method="gptq" if form == PACKED else "fp8" if kind == "float" else "int8",
        bits=bits,
        group_size=weights.get("group_size") or -1,
        symmetric=symmetric,
        desc_act=weights.get("actorder") in ("group", True),
        strategy="group" if form == PACKED else strategy,
        activations=_activations(inputs),
        skipped=tuple(config.get("ignore") or ()),
        extra=extra,
    )


def _write_groups(name: str, weight: GroupedWeight) -> dict[str, Tensor]:
    if weight.groups is not None:
        raise ModelError(f"{name}: compressed-tensors holds no order of inputs any more", hint="--desc_act false")
    tensors = {
        "weight_packed": pack_padded(weight.codes, weight.bits),
        "weight_scale": grouped.half(name, weight.scales).contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.symmetric:
        tensors["weight_zero_point"] = pack_padded(weight.zeros.T, weight.bits).T.contiguous()
    return {f"{name}.{part}": found for part, found in tensors.items()}


def _read_groups(name: str, tensor: Callable[[str], Tensor], settings: Settings) -> GroupedWeight:
    packed, scales, shape = (tensor(f"{name}.weight_{part}") for part in ("packed", "scale", "shape"))
    if shape.numel() != 2 or scales.ndim != 2 or packed.ndim != 2:
        raise ModelError(f"{name}: weight_shape, weight_scale and weight_packed are not those of a matrix")
    outputs, inputs = map(int, shape.tolist())
    codes = _unpack(packed, settings.bits, inputs)
    if codes is None or codes.shape[0] != outputs:
        raise ModelError(f"{name}: weight_packed {tuple(packed.shape)} does not hold {outputs} outputs of {inputs} inputs")
    zeros: Tensor | None = torch.full(scales.shape, 2 ** (settings.bits - 1), dtype=torch.uint8)
    if not settings.symmetric:
        words = tensor(f"{name}.weight_zero_point")
        zeros = _unpack(words.T, settings.bits, outputs)
        if zeros is None or zeros.T.shape != scales.shape:
            raise ModelError(f"{name}: weight_zero_point {tuple(words.shape)} does not fit weight_scale {tuple(scales.shape)}")
        zeros = zeros.T
    assert zeros is not None
    groups = tensor(f"{name}.weight_g_idx") if settings.desc_act else None
    return grouped.make(name, codes, scales, zeros, settings.bits, groups=groups)


def _unpack(words: Tensor, bits: int, count: int) -> Tensor | None:
    """(rows, count) of words that hold so many values in a row one way or the other, or None."""
    if words.shape[1] == -(-count * bits // 32):
        return unpack_padded(words, bits, count)
    return unpack_apart(words, bits, count) if words.shape[1] == -(-count // (32 // bits)) else None


def _inputs(settings: Settings, kind: str) -> dict[str, Any]:
    """How activations are rounded: for each token, for 128 of them beside blocks, or with one fixed scale."""
    found: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True, "group_size": None, "dynamic": True}
    if settings.activations == "static":
        return found | {"strategy": "tensor", "dynamic": False}
    if settings.strategy == "block":
        return found | {"strategy": "group", "group_size": scaled.BLOCK}
    return found | {"strategy": "token"}


def _activations(inputs: dict[str, Any] | None) -> str | None:
    """Of the ways to round activations those that are known; with others they are not rounded."""
    if not inputs or not inputs.get("symmetric", True) or inputs.get("num_bits") != 8:
        return None
    if inputs.get("dynamic"):
        return "dynamic" if inputs.get("strategy") in ("token", "group") else None
    return "static" if inputs.get("strategy") in ("tensor", None) else None
