"""Whole runs of the quantizer on small models, for tests."""

import json
from pathlib import Path

import torch

from swift.config.commands import QuantizeConfig
from swift.config.options import build as build_config
from swift.export.run import run_export
from swift.model.quantized import FORMATS
from swift.model.tokenizer import load_tokenizer
from swift.quantize.calibrate import documents
from swift.quantize.tensors import Checkpoint
from tests.tiny import make_model

ROWS = [
    {"messages": [{"role": "user", "content": f"What about day {n}?"}, {"role": "assistant", "content": f"Snow, {n} cm. " * 6}]}
    for n in range(40)
]


def wide(path: Path, **options) -> Path:
    return make_model(path, hidden_size=64, intermediate_size=128, **options)


def quantize(model: Path, rows: Path, out: Path, *, bare: bool = False, **options) -> Path:
    """``bare``: no options of GPTQ but those given. What is None is not said."""
    given = {"model": str(model), "dataset": [str(rows)], "output_dir": str(out), "device": "cpu"}
    given |= {"quant_eval_samples": 4, "max_length": 64}
    if options.get("quant_method") not in ("bnb", "fp8") or options.get("quant_activations") == "static":
        given["quant_n_samples"] = 12
    if not bare:
        given |= {"quant_method": "gptq", "quant_bits": 4, "group_size": 32}
    said = {name: value for name, value in (given | options).items() if value is not None}
    return run_export(build_config(QuantizeConfig, ("argument", said)))


def dense(folder: Path, layer: str, name: str = "gptq") -> torch.Tensor:
    """The weights of a layer in a checkpoint in the format ``name``."""
    form = FORMATS.get(name)
    tensors = Checkpoint(sorted(folder.glob("*.safetensors")))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return form.read(layer, tensors.read, form.settings(config)).dequantize()


def held_out(model: Path, rows: Path) -> list[list[int]]:
    """The documents that measure, as the quantizer chooses them."""
    given = {"model": str(model), "quant_method": "gptq", "dataset": [str(rows)], "quant_n_samples": 12, "quant_eval_samples": 4}
    config = build_config(QuantizeConfig, ("argument", given | {"max_length": 64}))
    return documents(config, load_tokenizer(model)).held_out
