"""Weights in few bits: what they are (base.py), and the checkpoint formats that hold them, one file each."""

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
