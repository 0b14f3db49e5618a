"""The folder that onnxruntime-genai reads, made by the model builder that comes with it.

That knows families by name, and its float16 runs on GPUs alone; in other cases the traced decoder gets a configuration of ours.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift import deps
from swift.errors import MachineError, ModelError, first_line
from swift.files import write_json
from swift.model.artifact import Artifact, ModelFolder
from swift.model.load import context_length, end_tokens
from swift.model.tokenizer import load_tokenizer, pad_token_id
from swift.quantize.measure import Measured, Reference

BUILDER = "onnxruntime_genai.models.builder"
CONFIG_FILE = "genai_config.json"
INT4 = ("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8")  # the head decides most: it keeps 8 bits


def check(model: ModelFolder) -> None:
    """DependencyError without onnxruntime-genai."""
    deps.require("onnxruntime_genai", extra="onnx")


def build(model: ModelFolder, precision: str, folder: Path) -> str | None:
    """Let the builder write into ``folder``; what went wrong, if something did, on one line. MachineError if the disk is full."""
    if precision == "fp16":
        return "the builder's float16 is for GPUs"
    options = ["hf_token=false", *(INT4 if precision == "int4" else ())]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        words = [sys.executable, "-m", BUILDER, "-i", str(model.path.resolve()), "-o", str(folder), "-p", precision, "-e", "cpu"]
        words += ["-c", cache, "--extra_options", *options]
        # A process of its own: its modules have names like "builders", and its memory is given back.
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode == 0:
        return None
    if "No space left" in done.stderr:
        raise MachineError(f"{folder}: No space left on device", hint="free some space, or choose another place")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
    return f"onnxruntime-genai's builder does not write this model ({lines[-1].partition(': ')[2] or lines[-1]})"


def write_config(model: ModelFolder, loaded: Any, shapes: list[tuple[int, int]], folder: Path) -> None:
    """genai_config.json for the traced decoder in ``folder``."""
    config = loaded.config.get_text_config()
    tokenizer = load_tokenizer(model.path)
    length = context_length(model.path) or 2048
    ends = end_tokens(loaded, tokenizer)
    (heads, width), layers = shapes[0], len(shapes) // 2
    if any(shape != shapes[0] for shape in shapes):
        raise ModelError(f"onnxruntime-genai wants keys and values of one size in all layers, {model.name} has others")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": width,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
    }
    about = {
        "bos_token_id": ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "context_length": length,
        "decoder": decoder,
        "eos_token_id": ends,
        "pad_token_id": pad_token_id(tokenizer),
        "type": "decoder",
        "vocab_size": loaded.get_input_embeddings().weight.shape[0],
    }
    search = {"do_sample": False, "max_length": length, "num_beams": 1, "past_present_share_buffer": False}
    write_json(folder / CONFIG_FILE, {"model": about, "search": search})


def logits_of(folder: Path) -> Callable[[list[int], tuple[tuple[int, int], ...]], torch.Tensor]:
    """A function that gives (T, V) of token ids, read in parts (begin, end) with the cache; ModelError if it does not load."""
    genai = deps.require("onnxruntime_genai", extra="onnx")
    try:
        model = genai.Model(str(folder))
    except RuntimeError as problem:
        raise ModelError(f"onnxruntime-genai does not load what was written: {first_line(problem)}") from None

    def logits(ids: list[int], parts: tuple[tuple[int, int], ...]) -> torch.Tensor:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 1)
        generator = genai.Generator(model, params)
        found = []
        for begin, end in parts:
            generator.append_tokens(np.array([ids[begin:end]], dtype=np.int32))
            found.append(torch.from_numpy(np.array(generator.get_output("logits"))[0]).float())
        return torch.cat(found)

    return logits


def verify(artifact: Artifact, reference: Reference, parts_of: Callable[[int], tuple[tuple[int, int], ...]]) -> Measured:
    """See Exporter: onnxruntime-genai's own generator reads the pieces."""
    logits = logits_of(artifact.path)
    loader = f"onnxruntime-genai {deps.require('onnxruntime_genai', extra='onnx').__version__}"
    return reference.compare(loader, lambda piece: logits(piece, parts_of(len(piece))))
