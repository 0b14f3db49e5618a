"""Linear layers whose weights are kept in few bits, and computed with in float32 by the compiled kernels."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swift.engine.native.codes import (
    INT8_WIDTH,
    WIDTHS,
    format_of_codes,
    in_nibbles,
    in_pairs,
    in_panels,
    out_of_nibbles,
    out_of_pairs,
    pack_codes,
)
from swift.engine.native.compiled import kernels
from swift.engine.native.mapped import MappedWeights
from swift.model.norms import rms_norm_of
from swift.model.quantized.base import GroupedWeight, ScaledWeight
from swift.model.quantized.linear import QuantizedLinear

# N outputs, K inputs, P panels of R outputs each, G groups of inputs

Format = Literal["float32", "float16", "bfloat16", "int8", "int4", "int4_g32", "int4_g64", "int4_g128"]
GROUP = {"int8": INT8_WIDTH, "int4": 32} | WIDTHS  # inputs that share a scale
MOST = {"float16": 65504.0}


@dataclass(frozen=True)
class Packed:
    """What was packed: layers of each format, and the bytes of their weights before and after."""

    formats: dict[Format, int]
    bytes_before: int
    bytes_after: int


class PackedLinear(nn.Module):
    """y = x W' + b in float32, with W (N, K) in ``format``: rounded to it, or the codes of a checkpoint as they are."""

    def __init__(self, weight: Tensor | GroupedWeight | ScaledWeight, bias: Tensor | None, format: Format) -> None:
        super().__init__()
        library = kernels()
        width = library.panel_width()
        self.format: Format = format
        if isinstance(weight, Tensor):
            self.out_features, self.in_features = weight.shape
            self.packed = pack(weight.detach(), format, width)
            self.bytes_before = weight.numel() * weight.element_size()
        else:
            self.out_features, self.in_features = weight.codes.shape
            self.packed = pack_codes(weight, format, width)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.function: Callable[..., None] = getattr(library, f"linear_{format}")
        self._weights = self.packed.data_ptr()
        self._bias = None if self.bias is None else self.bias.data_ptr()

    @property
    def weight(self) -> Tensor:
        """(N, K) float32, made anew: for whoever reads a layer's weight."""
        return unpack(self.packed, self.format, self.out_features, self.in_features, kernels().panel_width())

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self.forward(x.float()).to(x.dtype)
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        self.function(x.data_ptr(), rows, self.in_features, self._weights, self._bias, out.data_ptr(), self.out_features)
        return out


class CompiledNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in float32."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = weight.detach().float().contiguous()
        self.epsilon = epsilon
        self._function = kernels().rms_norm

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self.forward(x.float()).to(x.dtype)
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._function(x.data_ptr(), x.numel() // width, width, self.weight.data_ptr(), self.epsilon, out.data_ptr())
        return out


def pack_model(model: Any, format: Format | Literal["auto"]) -> Packed:
    """Replace the linear layers and RMSNorms of ``model`` by compiled ones, one after the other, so that memory falls.

    ``auto`` keeps what the weights are: 16 bits where nothing is lost by it, else float32. A layer whose inputs are no
    multiple of a group of ``int8`` or ``int4`` is kept as with ``auto``, and so is, with ``int4``, the head: as ``int8``.
    MachineError if there is no compiler.
    """
    kernels()
    pack_quantized(model, format)
    _copy_what_stays(model)
    files = MappedWeights()
    files.let_go()
    head = model.get_output_embeddings()
    formats: dict[Format, int] = {}
    before = after = 0
    for parent, name, module in list(_children(model)):
        linear: PackedLinear | None = module if isinstance(module, PackedLinear) else None
        if (weight := _weight(module)) is not None:
            wanted: Any = "int8" if format == "int4" and module is head else format
            linear = PackedLinear(weight, getattr(module, "bias", None), _suitable(weight, wanted))
            setattr(parent, name, linear)
            if weight.is_contiguous():
                files.let_go(weight)
        if linear is not None:
            formats[linear.format] = formats.get(linear.format, 0) + 1
            before += linear.bytes_before
            after += linear.packed.numel() * linear.packed.element_size()
        elif (found := rms_norm_of(module)) is not None:
            setattr(parent, name, CompiledNorm(*found))
    _give_back_memory()
    return Packed(formats, before, after)


def _copy_what_stays(model: Any) -> None:
    """Weights that are not packed get memory of their own, where a mapped file that one of them is part of would be held whole."""
    files = MappedWeights()
    packed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    packed.discard(id(model.get_input_embeddings().weight))  # of which the head may be a second use
    for weight in (*model.parameters(), *model.buffers()):
        if id(weight) not in packed and not files.holds(weight):
            weight.data = weight.data.clone()


def _give_back_memory() -> None:
    """What packing took for a moment, which glibc keeps otherwise: some 160 MB of a model of 540."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def pack_quantized(model: Any, format: Format | Literal["auto"]) -> None:
    """Replace the layers of a quantized checkpoint by compiled ones, which compute much faster.

    A layer keeps its codes, if ``format`` does not ask for other bits; where no kernel holds them exactly it becomes float16,
    in which others multiply it too.
    """
    for parent, name, module in list(_children(model)):
        if isinstance(module, QuantizedLinear):
            linear = _of_codes(module, format)
            linear.bytes_before = sum(part.numel() * part.element_size() for part in module.buffers())
            setattr(parent, name, linear)


def pack(weight: Tensor, format: Format, width: int) -> Tensor:
    """(N, K) in panels of ``width`` outputs, as the kernels read it; see kernels/linear.cpp."""
    panels_PKR = in_panels(weight, width)
    if format not in GROUP:
        return panels_PKR.to(getattr(torch, format)).contiguous()
    groups_PGKR = panels_PKR.float().unflatten(1, (-1, GROUP[format]))
    if format == "int8":
        scale = groups_PGKR.abs().amax(2, keepdim=True).div_(127).clamp_(min=1e-30).contiguous()
        whole = (groups_PGKR / scale).round_().clamp_(-127, 127).to(torch.int8)
        return torch.cat([scale.view(torch.int8).flatten(2), in_pairs(whole).flatten(2)], dim=2)
    scale, least = (part.contiguous() for part in _four_bits(groups_PGKR))
    nibbles = ((groups_PGKR - least.float()) / scale.float()).round_().clamp_(0, 15).to(torch.uint8)
    heads = [part.view(torch.uint8).flatten(2) for part in (scale, least)]
    return torch.cat([*heads, in_nibbles(nibbles).flatten(2)], dim=2)


def unpack(packed: Tensor, format: Format, count: int, inputs: int, width: int) -> Tensor:
    """(count, inputs) float32 of what ``pack`` or ``pack_codes`` made: the weights that the kernels compute with."""
    if format not in GROUP:
        return packed.float().transpose(1, 2).reshape(-1, inputs)[:count].contiguous()
    size = GROUP[format]
    if format == "int8":
        scale = packed[:, :, : 4 * width].contiguous().view(torch.float32).unsqueeze(2)
        groups = out_of_pairs(packed[:, :, 4 * width :].unflatten(2, (size // 2, width, 2))).float() * scale
    else:
        head, dtype = (8 * width, torch.float32) if format in WIDTHS else (4 * width, torch.bfloat16)
        heads = packed[:, :, :head].contiguous().view(dtype).float()
        scale, least = heads.unsqueeze(2).split(width, dim=3)
        groups = out_of_nibbles(packed[:, :, head:].unflatten(2, (size // 4, width, 2))).float() * scale + least
    whole: Tensor = groups.flatten(1, 2)
    return whole.transpose(1, 2).reshape(-1, inputs)[:count].contiguous()


def _four_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least value, bfloat16 (P, G, 1, R), of numbers from 0 to 15 that stand for ``groups`` (P, G, 32, R).

    Of some narrower ranges than from the smallest to the largest weight, that of the least squared error.
    """
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for share in (1.0, 0.95, 0.9, 0.85, 0.8):
        least = (middle - half * share).bfloat16()
        scale = (half * share * 2 / 15).clamp(min=1e-30).bfloat16()
        whole = ((groups - least.float()) / scale.float()).round_().clamp_(0, 15)
        error = (whole * scale.float() + least.float() - groups).square_().sum(2, keepdim=True)
        if best is None:
            best = error, scale, least
        else:
            better = error < best[0]
            best = torch.where(better, error, best[0]), torch.where(better, scale, best[1]), torch.where(better, least, best[2])
    assert best is not None
    return best[1], best[2]


def _of_codes(layer: QuantizedLinear, format: Format | Literal["auto"]) -> PackedLinear:
    weight = layer.quantized
    exact: Any = format_of_codes(weight)
    if exact is not None and (format == "auto" or exact.startswith(format)):
        return PackedLinear(weight, layer.bias, exact)
    dense = weight.dequantize()
    return PackedLinear(dense, layer.bias, _suitable(dense, "float16" if format == "auto" else format))


def _suitable(weight: Tensor, format: Format | Literal["auto"]) -> Format:
    """``format`` if ``weight`` can have it, else the fewest bits that lose nothing."""
    if format in GROUP and weight.shape[1] % GROUP[format]:
        format = "auto"
    if format == "float16" and weight.abs().amax() > MOST["float16"]:
        format = "auto"
    if format != "auto":
        return format
    if _is_exact(weight, torch.bfloat16):
        return "bfloat16"
    return "float16" if _is_exact(weight, torch.float16) else "float32"


def _is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds ``weight`` as it is; a part at a time, of which the first tells it most often."""
    return all(torch.equal(part.to(dtype).to(weight.dtype), part) for part in weight.split(max(1, 2**18 // weight.shape[1])))


def _weight(module: nn.Module) -> Tensor | None:
    """(N, K) of a layer that is a product and nothing else; None for every other module."""
    from transformers.pytorch_utils import Conv1D

    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    if type(module) is nn.Linear:
        return module.weight
    return module.weight.T if type(module) is Conv1D else None


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child
