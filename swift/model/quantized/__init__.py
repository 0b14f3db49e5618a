"""Weights in few bits: what they are (base.py), and the checkpoint formats that hold them, one file each."""

from typing import Any

from swift.registry import Registry

FORMATS = Registry(
    "checkpoint format",
    {
        "gptq": "swift.model.quantized.gptq:V1",
        "gptq_v2": "swift.model.quantized.gptq:V2",
        "awq": "swift.model.quantized.awq",
        "compressed-tensors": "swift.model.quantized.compressed",
        "fp8": "swift.model.quantized.fp8",
        "bnb": "swift.model.quantized.bnb",
    },
)


def format_of(config: dict[str, Any]) -> str | None:
    """The checkpoint format that a ``quantization_config`` names: a member of FORMATS, or another's name; None without any."""
    method = config.get("quant_method")
    if config.get("load_in_4bit") or config.get("load_in_8bit") or method == "bitsandbytes":
        return "bnb"
    return str(config.get("checkpoint_format") or config.get("format") or method) if method == "gptq" else method
