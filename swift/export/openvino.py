"""OpenVINO: the model as the engine has it, with its tokenizer, in a folder that openvino-genai runs as it is."""

import gc
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from swift import console
from swift.config.export import ExportConfig
from swift.engine.openvino import library
from swift.engine.openvino.convert import ATTENTION, MODEL_FILE, convert, probe, save
from swift.errors import ModelError, first_line
from swift.files import write_json
from swift.model.artifact import Artifact, ModelFolder
from swift.model.load import context_length, end_tokens, load_model
from swift.model.tokenizer import load_tokenizer, pad_token_id
from swift.quantize.measure import Measured, Reference

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
SAMPLES = ("Heavy snow is expected.\n\n  Stay at home!", "def f(x):\n\treturn x[0] + 12345", "今天有大雪，请留在家里。", "naïve café — 🙂")


def check(model: ModelFolder, config: ExportConfig) -> None:
    """See Exporter."""
    for name in ("openvino", "openvino_genai", "openvino_tokenizers"):
        library(name)


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """See Exporter."""
    loaded = load_model(model.path, torch_dtype="float32", attn_impl=ATTENTION, device="cpu").model
    shapes, window = probe(loaded)
    length = context_length(model.path)
    if window is not None and (length is None or window < length):
        raise ModelError(
            f"{model.name}: OpenVINO's attention sees everything, that of this model {window} tokens", hint="--to gguf, or --to onnx"
        )
    weight_format = config.openvino_weight_format
    made = convert(loaded, shapes, weight_format, model.name)
    model.copy_around(folder)
    tokenizer = load_tokenizer(model.path)
    _write_generation_config(loaded, tokenizer, folder)
    del loaded
    save(made, folder, weight_format)
    del made
    gc.collect()  # the weights in torch, and those in OpenVINO
    _write_tokenizer(tokenizer, folder)
    return Artifact(folder, f"OpenVINO ({weight_format})", (Path(MODEL_FILE).with_suffix(".bin").name, MODEL_FILE))


def verify(artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
    """See Exporter: OpenVINO's runtime reads the pieces in parts, with the state in the model."""
    ov = library("openvino")
    request = ov.Core().compile_model(artifact.path / MODEL_FILE, "CPU", EXACT).create_infer_request()

    def logits(piece: list[int]) -> Any:
        request.reset_state()
        ends = [0, *(end for end in (24, 25) if end < len(piece)), len(piece)]
        found = []
        for begin, end in pairwise(ends):
            request.infer(
                {
                    "input_ids": np.array([piece[begin:end]]),
                    "attention_mask": np.ones((1, end), dtype=np.int64),
                    "position_ids": np.arange(begin, end)[None],
                    "beam_idx": np.zeros(1, dtype=np.int32),
                }
            )
            found.append(request.get_tensor("logits").data[0].copy())
        return np.concatenate(found)

    return reference.compare(f"openvino {re.split('-', ov.__version__)[0]}", logits)


def _write_generation_config(loaded: Any, tokenizer: Any, folder: Path) -> None:
    """generation_config.json with what ends an answer: openvino-genai knows no other place for it."""
    settings = loaded.generation_config.to_diff_dict()
    settings |= {"eos_token_id": end_tokens(loaded, tokenizer), "pad_token_id": pad_token_id(tokenizer)}
    write_json(folder / "generation_config.json", settings)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """openvino_tokenizer.xml and openvino_detokenizer.xml. ModelError if OpenVINO has no such tokenizer."""
    ov, tokenizers = library("openvino"), library("openvino_tokenizers")
    try:
        made = tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    except (RuntimeError, ValueError, KeyError, AttributeError, NotImplementedError) as problem:  # as its converter fails on what it lacks
        raise ModelError(f"OpenVINO cannot compute this tokenizer: {first_line(problem)}", hint="--to gguf, or --to onnx") from problem
    for part, name in zip(made, ("tokenizer", "detokenizer"), strict=True):
        ov.save_model(part, folder / f"openvino_{name}.xml")
    compiled = ov.Core().compile_model(made[0], "CPU")
    for text in SAMPLES:
        found = compiled([text])["input_ids"][0].tolist()
        if found != tokenizer(text).input_ids:
            console.warn(f"OpenVINO's tokenizer splits some texts otherwise than the model's, the first is {text!r}")
            return
