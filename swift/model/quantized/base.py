"""Weights in few bits, as formats write and read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

# N outputs, K inputs, G groups of inputs


@dataclass(frozen=True)
class GroupedWeight:
    """W (N, K) = (codes - zeros) * scales, with scale and zero of the group of each input.

    ``codes`` (N, K) uint8 from 0 to 2^bits - 1; ``scales`` (N, G) float32, of values that float16 holds; ``zeros`` (N, G) uint8,
    2^(bits - 1) everywhere if ``symmetric``. ``groups`` (K,) is the group of each input; None: they follow each other, of equal size.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    symmetric: bool
    groups: Tensor | None = None

    def group_of_inputs(self) -> Tensor:
        """(K,) int64."""
        inputs, count = self.codes.shape[1], self.scales.shape[1]
        if self.groups is not None:
            return self.groups.long()
        return torch.arange(inputs, device=self.codes.device) // (inputs // count)

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        index = self.group_of_inputs()
        return (self.codes.float() - self.zeros.float()[:, index]) * self.scales.float()[:, index]


@dataclass(frozen=True)
class ScaledWeight:
    """W (N, K) = codes * scales, with ``codes`` in float8_e4m3fn or int8.

    ``scales`` float32: (1, 1) for the tensor, (N, 1) for channels, (ceil(N / 128), ceil(K / 128)) for blocks.
    ``input_scale`` is the scale of the inputs if it is fixed (static activations): x ~ codes * input_scale.
    """

    codes: Tensor
    scales: Tensor
    block: int | None = None
    input_scale: float | None = None

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        scales = self.scales.float()
        if self.block is not None:
            rows, columns = self.codes.shape
            scales = scales.repeat_interleave(self.block, 0)[:rows].repeat_interleave(self.block, 1)[:, :columns]
        return self.codes.float() * scales


Weight = GroupedWeight | ScaledWeight


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says of its quantization. ``skipped`` are the linear layers that were left as they are."""

    method: str
    bits: int
    group_size: int = -1
    symmetric: bool = True
    desc_act: bool = False
    strategy: str = "group"
    activations: str | None = None
    skipped: Sequence[str] = ()
    extra: dict[str, Any] = field(default_factory=dict)


class WeightFormat(Protocol):
    """How a checkpoint holds quantized weights. A member is an object with these functions, or a module."""

    markers: tuple[str, ...]
    """Ends of names of tensors, one of which each quantized layer has and no other."""

    least_zero: int
    """Least zero point of a grouped weight that it holds: 1 where the file has it less one, else 0."""

    def unfit(self, weight_shape: tuple[int, int], settings: Settings) -> str | None:
        """Why a layer of this shape (N, K) cannot be held (its rows or columns do not fill whole words), or None."""

    def write(self, name: str, weight: Weight, settings: Settings) -> dict[str, Tensor]:
        """The tensors of the layer ``name``, by their names in the file."""

    def read(self, name: str, tensor: Callable[[str], Tensor], settings: Settings) -> Weight:
        """The inverse of ``write``; ``tensor`` gives a tensor of the file by its name."""

    def config(self, settings: Settings) -> dict[str, Any]:
        """``quantization_config`` of config.json."""

    def settings(self, config: dict[str, Any]) -> Settings:
        """The inverse of ``config``, for checkpoints of other tools too; ModelError for what is not supported."""
