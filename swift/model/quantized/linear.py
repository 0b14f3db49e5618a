"""A linear layer that keeps its weight in few bits and turns it into floating-point numbers at each use."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swift.model.quantized.base import GroupedWeight, ScaledWeight
from swift.model.quantized.words import pack, unpack

# N outputs, K inputs

FP8_MOST, INT8_MOST = 448.0, 127.0  # largest values of e4m3 and, on both sides of zero, of int8


class QuantizedLinear(nn.Linear):
    """y = x W' + b with W (N, K) in few bits, which does not learn; ``dtype`` is that of the dense weight.

    ``activations``: x is rounded to 8 bits as the checkpoint asks ("dynamic", "static"), so that the outputs are those of an
    engine that multiplies in 8 bits; None leaves x as it is.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor | None

    def __init__(self, weight: GroupedWeight | ScaledWeight, bias: Tensor | None, dtype: torch.dtype, activations: str | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.codes.shape
        self.dtype = dtype
        self.activations = activations
        self.bits = weight.bits if isinstance(weight, GroupedWeight) else 8
        # Integers, so that model.to(a precision) leaves them alone.
        half = weight.scales.half()
        is_half = torch.equal(half.float(), weight.scales)
        self._scale_dtype = torch.float16 if is_half else torch.float32
        self._scale_shape = weight.scales.shape
        self.register_buffer("scales", (half if is_half else weight.scales).flatten().contiguous().view(torch.uint8))
        zeros = groups = None
        self._code_dtype: torch.dtype | None = None
        if isinstance(weight, GroupedWeight):
            width = -(-self.in_features // 32) * 32
            self.register_buffer("codes", pack(F.pad(weight.codes, (0, width - self.in_features)), self.bits))
            zeros = None if weight.symmetric else weight.zeros
            groups = None if weight.groups is None else weight.groups.to(torch.int32)
            self._block = self._input_scale = None
        else:
            self._code_dtype = weight.codes.dtype
            self.register_buffer("codes", weight.codes.view(torch.uint8))
            self._block, self._input_scale = weight.block, weight.input_scale
        self.register_buffer("zeros", zeros)
        self.register_buffer("groups", groups)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def quantized(self) -> GroupedWeight | ScaledWeight:
        """The weight as it was given."""
        scales = self.scales.view(self._scale_dtype).float().view(self._scale_shape)
        if self._code_dtype is not None:
            return ScaledWeight(self.codes.view(self._code_dtype), scales, self._block, self._input_scale)
        whole = unpack(self.codes, self.bits)[:, : self.in_features]
        zeros = self.zeros
        if zeros is None:
            zeros = torch.full(scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=scales.device)
        return GroupedWeight(whole, scales, zeros, self.bits, self.zeros is None, self.groups)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K) dense, made anew: for whoever reads a layer's weight."""
        return self.quantized.dequantize().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """x as the layer multiplies it."""
        if self.activations is None or self._code_dtype is None:
            return x
        if self._input_scale is not None:
            return round_to(self._code_dtype, x, torch.tensor(self._input_scale, device=x.device))
        most = INT8_MOST if self._code_dtype == torch.int8 else FP8_MOST
        parts = x
        if self._block is not None:
            width = -(-self.in_features // self._block) * self._block
            parts = F.pad(x, (0, width - self.in_features)).unflatten(-1, (-1, self._block))
        scale = parts.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / most
        parts = round_to(self._code_dtype, parts, scale)
        return parts if self._block is None else parts.flatten(-2)[..., : self.in_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self.bits}"


def round_to(dtype: torch.dtype, x: Tensor, scale: Tensor) -> Tensor:
    """``x`` by numbers of ``dtype`` (int8 or e4m3) times ``scale``, the nearest ones that there are."""
    scaled = x.float() / scale
    if dtype == torch.int8:
        return (scaled.round().clamp(-INT8_MOST - 1, INT8_MOST) * scale).to(x.dtype)
    return (scaled.clamp(-FP8_MOST, FP8_MOST).to(dtype).float() * scale).to(x.dtype)


def densify(model: nn.Module) -> nn.Module:
    """``model`` with each QuantizedLinear as a plain layer that can learn and be changed, one after the other."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.weight)
            plain.bias = module.bias
            model.set_submodule(name, plain.train(module.training))
    return model


class _Product(torch.autograd.Function):
    """x W'. Neither direction keeps the dense weight; rounding of x passes gradients through as if it were not there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        ctx.dtype = x.dtype
        return F.linear(layer.rounded(x), layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (out,) = gradients
        return (out @ ctx.layer.weight.to(out.dtype)).to(ctx.dtype), None
