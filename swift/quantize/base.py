"""The contract of a quantizer: rules that turn a layer's weights into few bits, from what was seen of its inputs."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from swift.model.quantized.base import Settings, Weight
from swift.quantize.folds import Fold

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


@runtime_checkable
class ScalingQuantizer(Quantizer, Protocol):
    """A quantizer that scales inputs before it rounds: what produces them is divided, the layers are multiplied."""

    def quantize_scaled(
        self, block: nn.Module, layers: dict[str, nn.Linear], inputs: Inputs, fold: Fold, made: dict[str, Weight], dtype: torch.dtype
    ) -> tuple[dict[str, Weight], Tensor]:
        """Weights of ``layers`` of ``block`` for inputs divided by a scale (K,), and that scale.

        The block is changed so that it computes the same as before: the ``fold``'s producer is divided, the layers are
        multiplied. ``made`` are weights of the block that are quantized already; that of the producer is divided there too.
        ``dtype`` is the precision in which what is not quantized will be stored. ``inputs`` stay those before the division.
        """


@dataclass(frozen=True)
class Plan:
    """What is done to a model: the settings of the checkpoint, and the layers that stay as they are with the reason for each."""

    settings: Settings
    skipped: dict[str, str]
