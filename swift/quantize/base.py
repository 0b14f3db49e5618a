"""The contract of a quantizer: rules that turn a layer's weights into few bits, from what was seen of its inputs."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from swift.model.quantized.base import Settings, Weight

# N outputs, K inputs


@dataclass
class Inputs:
    """What was seen of the inputs x (K,) of layers that share them, in float32.

    ``hessian`` (K, K) is the mean of x x'; ``mean_abs`` and ``max_abs`` (K,) are of single inputs; ``count`` is the number of x.
    What a quantizer does not ask for is None.
    """

    count: int = 0
    hessian: Tensor | None = None
    mean_abs: Tensor | None = None
    max_abs: Tensor | None = None


class Quantizer(Protocol):
    """Turns the weights of layers into few bits."""

    needs: frozenset[str]
    """Of "hessian", "mean_abs" and "max_abs" what it wants to know of inputs; empty if it needs no calibration."""

    def quantize(self, layers: dict[str, nn.Linear], inputs: Inputs) -> dict[str, Weight]:
        """Weights of ``layers``, which share ``inputs``, by their names. The layers are not changed."""


@dataclass(frozen=True)
class Plan:
    """What is done to a model: the settings of the checkpoint, and the layers that stay as they are with the reason for each."""

    settings: Settings
    skipped: dict[str, str]
