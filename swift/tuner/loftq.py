"""LoftQ: LoRA starts from what 4-bit weights have lost."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.errors import ConfigError, ModelError


@torch.no_grad()
def start_from_lost_bits(tuned: Any) -> None:
    """Set B A of each 4-bit layer to the best approximation of its rank to the quantization error.

    One step of Li et al. 2023, algorithm 1 (arXiv:2310.08659), with the weights as bitsandbytes has quantized them. The model
    is read from where it was loaded; ConfigError if it is not there or has other names on disk.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    path = Path(tuned.get_base_model().config._name_or_path)
    files = _files_by_weight(path)
    prefix = "base_model.model."
    for name, module in tuned.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        weight = module.get_base_layer().weight
        stored = dequantize_4bit(weight.data, weight.quant_state).float()
        lost = _read(files, f"{name.removeprefix(prefix)}.weight", path).to(stored) - stored
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        root = (S[: A.shape[0]] / module.scaling["default"]).sqrt()
        A.data.copy_(root[:, None] * Vh[: A.shape[0]])
        B.data.copy_(U[:, : A.shape[0]] * root)


def _files_by_weight(path: Path) -> dict[str, Path]:
    """The file of each weight of the model in ``path``."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: path / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    if not found:
        raise ModelError(f"{path}: --init_weights loftq finds no safetensors to compare with")
    return found


def _read(files: dict[str, Path], name: str, path: Path) -> Tensor:
    from safetensors import safe_open

    if name not in files:
        raise ConfigError(f"{path}: --init_weights loftq finds no weight {name} on disk", hint="use --init_weights true")
    with safe_open(files[name], framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
