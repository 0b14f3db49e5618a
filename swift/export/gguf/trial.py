"""Proof that an architecture is written as it is read: a small model of the same kind goes into a file and comes back.

Widths are made small, and nothing else: the number of layers, activations, caps, windows, scaling and biases are the
model's own. All weights are random, so that a tensor in the wrong place or layout changes the predictions.
"""

import copy
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.errors import ModelError, first_line
from swift.export.gguf import child
from swift.export.gguf.layout import Layout, architecture, candidates, own_fields
from swift.export.gguf.settings import window_of
from swift.export.gguf.write import Checkpoint, plan, write_gguf
from swift.files import explain_os_errors
from swift.hub.gguf import quiet, read_model

HEAD_DIM = 32  # of the small model: rotary dimensions of a part of it are still whole numbers
FILE = "trial.gguf"
VOCABULARY = 96
WINDOW = 6
LENGTH = 16  # tokens of the text
# Largest difference of a log-probability in float32. llama.cpp takes some activations from tables in float16: up to 2e-3 seen.
TOLERANCE = {"transformers": 1e-4, "llama.cpp": 1e-2}


@dataclass(frozen=True)
class Proof:
    """What the trial found: how tensors are laid out, whether the file may name a window, and what read it."""

    layout: Layout
    window: bool
    reader: str


def prove(config: Any) -> Proof:
    """The way to write models with this configuration. ModelError if there is none that a reader understands."""
    reader = "llama.cpp" if child.is_installed() else "transformers"
    arch = architecture(config)
    if getattr(config, "num_attention_heads", None) is None:
        raise ModelError(f"models of type {config.model_type} ({arch}) have no attention, and are not written as GGUF")
    small = shrink(own_fields(config))
    model = _random_model(small)
    reasons = []
    with tempfile.TemporaryDirectory(prefix="swift-gguf-") as folder, explain_os_errors(Path(folder)):
        with quiet():
            model.save_pretrained(folder)
        for layout in candidates(small):
            for window in (True, False) if window_of(small) else (True,):
                try:
                    difference = _difference(small, model, layout, window, Path(folder), reader)
                except ModelError as problem:
                    reasons.append(problem.message.removeprefix(f"{Path(folder) / FILE}: "))
                    continue
                if difference <= TOLERANCE[reader]:
                    return Proof(Layout(own_fields(config), type(layout.processor)), window, reader)
                reasons.append(f"read by {reader}, log-probabilities differ by {difference:.2g}")
    further = "" if reader == "llama.cpp" else "; llama.cpp itself may know more: pip install 'swift-llm[llamacpp]'"
    raise ModelError(
        f"models of type {config.model_type} with these settings cannot be written as GGUF: {reasons[0]}",
        hint=f"--to openvino and --to onnx know others{further}",
    )


def shrink(config: Any) -> Any:
    """The same configuration with small widths."""
    small = copy.deepcopy(config)
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    old = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = min(old, HEAD_DIM)
    few = min(groups, 2)
    many = few * min(heads // groups, 2)
    share = config.hidden_size // heads  # of the width, for each head
    scalar = getattr(config, "query_pre_attn_scalar", None)
    values = {
        "hidden_size": many * max(share * head // old, 2),
        "num_attention_heads": many,
        "num_key_value_heads": few,
        "head_dim": head,
        "vocab_size": VOCABULARY,
        "intermediate_size": 64,
        "n_inner": 64,
        "ffn_dim": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": min(4, getattr(config, "num_experts", None) or 4),
        "num_local_experts": min(4, getattr(config, "num_local_experts", None) or 4),
        "num_experts_per_tok": min(2, getattr(config, "num_experts_per_tok", None) or 2),
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": {old: head, share: max(share * head // old, 2)}.get(scalar, scalar),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": torch.float32,
    }
    for name, value in values.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    rope = getattr(small, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        for name in ("long_factor", "short_factor"):
            if name in part:
                part[name] = part[name][: len(part[name]) * head // old]
    return small


def _random_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as problem:
            raise ModelError(f"no small model of type {config.model_type} can be made to try: {first_line(problem)}") from problem
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = noise * 0.15 if parameter.dim() > 1 else parameter.data + noise * 0.1
    return model.eval()


def _difference(config: Any, model: Any, layout: Layout, window: bool, folder: Path, reader: str) -> float:
    """Largest difference of a log-probability between ``model`` and what ``reader`` makes of its file."""
    file = folder / FILE
    checkpoint = Checkpoint.open(sorted(folder.glob("*.safetensors")))
    facts = {
        "general.name": "trial",
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.tokens": [f"t{n}" for n in range(config.vocab_size)],
    }
    planned = plan(config, layout, checkpoint, window=window)
    write_gguf(file, planned, checkpoint, "f32", facts)
    length = min(LENGTH, planned.keys["context_length"])
    ids = [(7 * number + 3) % config.vocab_size for number in range(length)]
    with torch.no_grad():
        wanted: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    if reader == "llama.cpp":
        with child.opened(file, length) as opened:
            found = torch.from_numpy(opened.logits(ids))
    else:
        with torch.no_grad():
            found = read_model(file)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    difference = (wanted - found.float().log_softmax(-1)).abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")
