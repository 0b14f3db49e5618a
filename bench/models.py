"""Models to measure with: whether weights lie on a grid of few bits already, the same model in another order, random ones.

A model made from a file in few bits has weights that rounding in the groups of that file finds rounded. The share of the
rounding error that is left says how far a measurement flatters: 1 is what weights give that know nothing of the grid.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight$")


def rounding_error(weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> float:
    """Root mean square error of rounding to nearest over that of a value that lies anywhere between two steps."""
    groups = weight.float().unflatten(1, (-1, group_size))
    top, half = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        low, step = torch.zeros(()), groups.abs().amax(-1, keepdim=True) / (half - 0.5)
        codes = (groups / step).round().clamp(-half, half - 1)
    else:
        low = groups.amin(-1, keepdim=True)
        step = (groups.amax(-1, keepdim=True) - low) / top
        codes = ((groups - low) / step).round()
    return float(((codes * step + low - groups) / step).nan_to_num().square().mean().sqrt() * 12**0.5)


def left_to_round(model: Path, bits: int, group_size: int) -> dict[str, float]:
    """Means of the model's linear layers in its blocks."""
    weights = [value for name, value in _tensors(model).items() if LINEAR.search(name)]
    if odd := {weight.shape[1] for weight in weights if weight.shape[1] % group_size}:
        raise SystemExit(f"--group_size {group_size} does not divide {', '.join(map(str, sorted(odd)))}, widths of {model}")
    return {
        name: sum(rounding_error(weight, bits, group_size, symmetric=symmetric) for weight in weights) / len(weights)
        for name, symmetric in (("symmetric", True), ("asymmetric", False))
    }


def shuffle_channels(model: Path, folder: Path) -> Path:
    """Write the model into ``folder`` with hidden channels, those inside each MLP and each head's values in a random order.

    It computes the same; its groups have other members. For models with the names and shapes of Llama's blocks.
    """
    tensors, config = _tensors(model), json.loads((model / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    repeats = heads // config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(width, generator=generator)
    order = {}
    for name in sorted({match[1] for match in map(re.compile(r"(.*layers\.\d+\.)").match, tensors) if match}):
        values = [size * head + torch.randperm(size, generator=generator) for head in range(heads // repeats)]
        asked = [size * head + (values[head // repeats] % size) for head in range(heads)]
        inner = torch.randperm(config["intermediate_size"], generator=generator)
        order[name] = {"v": torch.cat(values), "o": torch.cat(asked), "mlp": inner}
    for name, value in tensors.items():
        own = next((found for layer, found in order.items() if name.startswith(layer)), {})
        if name.endswith(("q_proj.weight", "k_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            value = value[:, hidden]
        elif name.endswith("v_proj.weight"):
            value = value[own["v"]][:, hidden]
        elif name.endswith("o_proj.weight"):
            value = value[hidden][:, own["o"]]
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            value = value[own["mlp"]][:, hidden]
        elif name.endswith("down_proj.weight"):
            value = value[hidden][:, own["mlp"]]
        elif not name.endswith(("q_norm.weight", "k_norm.weight")):
            assert value.shape == (width,), f"{name} {tuple(value.shape)}: not a model of Llama's blocks"
            value = value[hidden]
        tensors[name] = value.contiguous()
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "swift-snapshot.json"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_model(tokenizer: Path, layers: int, folder: Path) -> Path:
    """A Llama of ``layers`` blocks of 13.6 MB each, with random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _tensors(model: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        found |= load_file(file)
    return found
