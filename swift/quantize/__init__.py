"""Quantizers: weights in few bits, block by block, in the checkpoints that engines load. One contract (base.py)."""

from swift.registry import Registry

QUANTIZERS = Registry(
    "quantization method",
    {
        "gptq": "swift.quantize.gptq:make",
        "awq": "swift.quantize.awq:make",
        "fp8": "swift.quantize.scaled:make_fp8",
        "int8": "swift.quantize.scaled:make_int8",
        "bnb": "swift.quantize.bnb:make",
    },
    group="swift.quantizer",
)
