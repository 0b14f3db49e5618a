"""bitsandbytes, which needs no text: its own functions quantize."""

from torch import nn

from swift import deps
from swift.config.export import ExportConfig
from swift.model.device import DTYPES
from swift.model.quantized import bnb
from swift.model.quantized.base import Settings, Weight
from swift.quantize.base import Inputs


class Bnb:
    """The quantizer; ``settings.extra`` says which number format 4 bits have, and whether their scales are quantized too."""

    needs: frozenset[str] = frozenset()

    def __init__(self, settings: Settings) -> None:
        deps.require("bitsandbytes", extra="bnb")
        self.settings = settings
        self.dtype = DTYPES[settings.extra.get("compute_dtype", "bfloat16")]

    def quantize(self, layers: dict[str, nn.Linear], inputs: Inputs) -> dict[str, Weight]:
        """See Quantizer."""
        return {name: bnb.from_float(layer.weight.to(self.dtype), self.settings) for name, layer in layers.items()}


def make(config: ExportConfig, settings: Settings) -> Bnb:
    return Bnb(settings)
