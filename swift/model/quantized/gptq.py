"""Checkpoints of GPTQ, as AutoGPTQ wrote them first (V1) and gptqmodel's second form (V2).

``qweight`` (K * bits / 32, N) packs along the inputs, ``qzeros`` (G, N * bits / 32) along the outputs; ``scales`` (G, N) in
float16, ``g_idx`` (K,) the group of each input. V1 stores each zero point less one.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.model.quantized import grouped
from swift.model.quantized.base import GroupedWeight, Settings, Weight
from swift.model.quantized.words import pack, unpack

# N outputs, K inputs, G groups of inputs

BITS = (2, 3, 4, 8)


class GPTQ:
    """The format with its ``checkpoint_format`` and ``least_zero``, which is also what the file subtracts from zero points."""

    markers = ("qweight",)

    def __init__(self, name: str, least_zero: int) -> None:
        self.name = name
        self.least_zero = least_zero

    def unfit(self, weight_shape: tuple[int, int], settings: Settings) -> str | None:
        """See WeightFormat."""
        outputs, inputs = weight_shape
        for count, what in ((outputs, "outputs"), (inputs, "inputs")):
            if count * settings.bits % 32:
                return f"{count} {what} of {settings.bits} bits do not fill words of 32 bits"
        return grouped.unfit(inputs, settings)

    def write(self, name: str, weight: Weight, settings: Settings) -> dict[str, Tensor]:
        """See WeightFormat. ModelError for a zero point of 0 in V1, which its readers take for 16."""
        found = grouped.of(name, weight)
        if int(found.zeros.min()) < self.least_zero:
            raise ModelError(f"{name}: the format {self.name} holds no zero point of 0", hint="write gptq_v2, which does")
        return {
            f"{name}.qweight": pack(found.codes, found.bits).T.contiguous(),
            f"{name}.qzeros": pack((found.zeros - self.least_zero).T.contiguous(), found.bits),
            f"{name}.scales": grouped.half(name, found.scales).T.contiguous(),
            f"{name}.g_idx": found.group_of_inputs().to(torch.int32),
        }

    def read(self, name: str, tensor: Callable[[str], Tensor], settings: Settings) -> GroupedWeight:
        """See WeightFormat. Bits are those of the tensors, which may differ from layer to layer."""
        words, scales, groups = (tensor(f"{name}.{part}") for part in ("qweight", "scales", "g_idx"))
        inputs, outputs = groups.numel(), scales.shape[1]
        bits = 32 * words.shape[0] // max(inputs, 1)
        if bits not in BITS or words.shape != (inputs * bits // 32, outputs):
            raise ModelError(f"{name}: qweight {tuple(words.shape)} does not hold {outputs} outputs of {inputs} inputs")
        zeros = self._zeros(name, tensor(f"{name}.qzeros"), tuple(scales.shape), bits)
        codes = unpack(words.T.contiguous(), bits)
        return grouped.make(name, codes, scales.T, zeros.T, bits, groups=groups)

    def _zeros(self, name: str, words: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
        """(G, N) uint8."""
        if words.shape != (shape[0], shape[1] * bits // 32):
            raise ModelError(f"{name}: qzeros {tuple(words.shape)} do not fit scales {shape}")
        if self.least_zero and 8 % bits == 0:
            # One is added to whole words: where a zero point of 0 was stored, gptqmodel borrowed from the next.
            words = words + pack(torch.ones(32 // bits, dtype=torch.uint8, device=words.device), bits)
            return unpack(words, bits)
        return (unpack(words, bits) + self.least_zero) & (2**bits - 1)

    def config(self, settings: Settings) -> dict[str, Any]:
        """See WeightFormat. Layers that were left are named in ``dynamic``, which gptqmodel and vLLM read."""
        return {
            "quant_method": "gptq",
            "bits": settings.bits,
            "group_size": settings.group_size,
            "sym": settings.symmetric,
            "desc_act": settings.desc_act,
            "damp_percent": settings.extra.get("damp_percent", 0.01),
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "dynamic": {f"-:.*{re.escape(name)}$": {} for name in settings.skipped},
        }

    def settings(self, config: dict[str, Any]) -> Settings:
        """See WeightFormat. Which layers were left is not asked of ``config``: they have no ``qweight``."""
        bits = config.get("bits")
        if bits not in BITS:
            raise ModelError(f"gptq with {bits} bits is not supported", hint=f"2, 3, 4 and 8 are; bits of this model: {bits}")
        return Settings(
            method="gptq",
            bits=bits,
            group_size=config.get("group_size", 128),
            symmetric=bool(config.get("sym", True)),
            desc_act=bool(config.get("desc_act", False)),
            skipped=tuple(_plain(rule) for rule in config.get("dynamic") or {} if rule.startswith("-:")),
            extra={key: config[key] for key in ("damp_percent",) if key in config},
        )


def _plain(rule: str) -> str:
    """The name in a rule that ``config`` wrote; a rule of others as it is."""
    return re.sub(r"\\(.)", r"\1", rule.removeprefix("-:").removeprefix(".*").removesuffix("$"))


V1 = GPTQ("gptq", 1)
V2 = GPTQ("gptq_v2", 0)
