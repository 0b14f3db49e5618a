"""Checkpoints in few bits of a model on disk, rounded to the nearest: one tensor after the other through a format."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from swift.model.quantized import FORMATS
from swift.model.quantized.base import GroupedWeight, ScaledWeight, Settings, Weight
from swift.model.quantized.bnb import from_float

SKIPPED = ("lm_head", "model.layers.0.mlp.down_proj")


def round_weight(weight: Tensor, settings: Settings) -> Weight:
    """``weight`` (N, K) float32 rounded to the nearest as ``settings`` say, with a random order of inputs for desc_act."""
    if settings.method == "bnb":
        return from_float(weight, settings)
    if settings.method in ("fp8", "int8"):
        return _scaled(weight, settings)
    outputs, inputs = weight.shape
    size = inputs if settings.group_size < 0 else settings.group_size
    groups = torch.arange(inputs) // size
    if settings.desc_act:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    parts = weight[:, groups.argsort(stable=True)].view(outputs, -1, size)
    least, most = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    top, half = 2**settings.bits - 1, 2 ** (settings.bits - 1)
    spread = torch.maximum(-least, most) / (half - 0.5) if settings.symmetric else (most - least) / top
    scales = spread.clamp(min=1e-4).half().float()
    zeros = torch.full_like(scales, half) if settings.symmetric else (-least / scales).round().clamp(1, top)
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, top)
    order = groups if settings.desc_act else None
    return GroupedWeight(codes.to(torch.uint8), scales, zeros.to(torch.uint8), settings.bits, settings.symmetric, order)


def _scaled(weight: Tensor, settings: Settings) -> ScaledWeight:
    dtype, most = (torch.float8_e4m3fn, 448) if settings.method == "fp8" else (torch.int8, 127)
    static = 0.05 if settings.activations == "static" else None
    block = 128 if settings.strategy == "block" else None
    if block is not None:
        rows, columns = (-(-count // block) for count in weight.shape)
        padded = torch.zeros(rows * block, columns * block)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        scales = padded.view(rows, block, columns, block).abs().amax((1, 3)) / most
    else:
        scales = weight.abs().amax(1, keepdim=True) / most if settings.strategy == "channel" else weight.abs().amax().view(1, 1) / most
    spread = scales if block is None else scales.repeat_interleave(block, 0)[: weight.shape[0]].repeat_interleave(block, 1)
    whole = weight / spread[:, : weight.shape[1]]
    return ScaledWeight((whole.round() if dtype == torch.int8 else whole).to(dtype), scales, block, static)


def make_checkpoint(source: Path, target: Path, name: str, settings: Settings) -> dict[str, Tensor]:
    """Write the model ``source`` to ``target`` in the format ``name``; the dense weights (float32) that it stands for, by layers."""
    format = FORMATS.get(name)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118, it is no dict
            layer = key.removesuffix(".weight")
            if not layer.endswith("_proj") or layer in settings.skipped:
                tensors[key] = file.get_tensor(key)
                continue
            weight = round_weight(file.get_tensor(key), settings)
            dense[layer] = weight.dequantize()
            tensors |= format.write(layer, weight, settings)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    change_config(target, quantization_config=format.config(settings))
    return dense


def change_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
