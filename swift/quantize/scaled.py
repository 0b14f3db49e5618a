"""FP8 and int8: weights in 8 bits with scales, for engines that round activations to 8 bits too.

FP8 keeps small numbers beside large ones. int8 does not: one channel of activations that is larger than all others takes the
precision from them. So what produces its inputs is divided where that can be done, and the weights take over part of the range:
Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, arXiv 2211.10438.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swift.config.export import ExportConfig
from swift.errors import ModelError
from swift.model.quantized.base import ScaledWeight, Settings, Weight
from swift.quantize.base import Inputs
from swift.quantize.folds import Fold

# N outputs, K inputs

BLOCK = 128
LEAST = 1e-5  # of the largest: inputs and columns of weights that are smaller are scaled as if they were so large
POWERS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Number:
    """A number format of 8 bits: its largest value, and by what the scale that reaches it is multiplied in a search."""

    dtype: torch.dtype
    largest: float
    ratios: tuple[float, ...]

    def round(self, values: Tensor) -> Tensor:
        """The codes nearest to ``values``, of which those beyond the range become its ends."""
        if self.dtype == torch.int8:
            return values.round().clamp_(-128, 127).to(self.dtype)
        return values.clamp(-self.largest, self.largest).to(self.dtype)


# A float loses nothing below its largest value, but other scales meet what matters better; whole numbers can be clipped.
FP8 = Number(torch.float8_e4m3fn, 448.0, tuple(1 + step / 8 for step in range(8)))
INT8 = Number(torch.int8, 127.0, (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7))


class Fp8:
    """The quantizer of FP8 (E4M3). It looks at text if the activations' scale is static; that makes its weights better too."""

    number = FP8

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_static = settings.activations == "static"
        self.needs = frozenset({"mean_abs", "max_abs"}) if self.is_static else frozenset[str]()

    def quantize(self, layers: dict[str, nn.Linear], inputs: Inputs) -> dict[str, Weight]:
        """See Quantizer. ModelError if a static scale is wanted of inputs that no text reached."""
        return self._quantize({name: layer.weight.detach().float() for name, layer in layers.items()}, inputs.mean_abs, inputs.max_abs)

    def _quantize(self, weights: dict[str, Tensor], mean_abs: Tensor | None, max_abs: Tensor | None) -> dict[str, Weight]:
        input_scale = None
        if self.is_static:
            if max_abs is None:
                raise ModelError(
                    f"{next(iter(weights))}: the calibration text does not reach it, so that its inputs have no scale",
                    hint="calibrate with more data (--quant_n_samples), or say --quant_activations dynamic",
                )
            input_scale = float(max_abs.max()) / self.number.largest or 1.0
        made: dict[str, Weight] = {}
        for name, weight in weights.items():
            scales = find_scales(weight, self.number, self.settings.strategy, mean_abs)
            block = BLOCK if self.settings.strategy == "block" else None
            made[name] = ScaledWeight(self.number.round(weight / _spread(scales, weight)), scales, block, input_scale)
        return made


class Int8(Fp8):
    """The quantizer of int8, which moves range from the activations to the weights."""

    number = INT8

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.needs = frozenset({"mean_abs", "max_abs"})

    def quantize_scaled(
        self, block: nn.Module, layers: dict[str, nn.Linear], inputs: Inputs, fold: Fold, made: dict[str, Weight], dtype: torch.dtype
    ) -> tuple[dict[str, Weight], Tensor]:
        """See ScalingQuantizer. A producer whose rows share their scale with others, and so cannot be divided, stays as it is."""
        mean_abs, max_abs = inputs.mean_abs, inputs.max_abs
        if mean_abs is None or max_abs is None or (self.settings.strategy == "tensor" and fold.producer in made):
            return self.quantize(layers, inputs), torch.ones(len(fold.share), device=fold.share.device)
        weight = torch.cat([layer.weight.detach().float() for layer in layers.values()])
        scale = fold.divide(block, find_smoothing(weight, mean_abs, max_abs, fold, is_static=self.is_static), dtype, made)
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.mul_(scale)
        weights = {name: layer.weight.detach().float() for name, layer in layers.items()}
        return self._quantize(weights, mean_abs / scale, max_abs / scale), scale


def make_fp8(config: ExportConfig, settings: Settings) -> Fp8:
    return Fp8(settings)


def make_int8(config: ExportConfig, settings: Settings) -> Int8:
    return Int8(settings)


def find_scales(weight: Tensor, number: Number, strategy: str, mean_abs: Tensor | None = None) -> Tensor:
    """Scales of ``weight`` (N, K) for the tensor, channels or blocks, in the shape that ScaledWeight has.

    The least scale that clips nothing; if the mean size of inputs ``mean_abs`` (K,) is known, the best of several for the squared
    error weighted by its square. 1 for what is all zero.
    """
    largest = _reduce(weight.abs(), strategy, torch.amax) / number.largest
    base = torch.where(largest > 0, largest.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    if mean_abs is None:
        return base
    importance = mean_abs.square()
    errors = []
    for ratio in number.ratios:
        spread = _spread(base * ratio, weight)
        rounded = number.round(weight / spread).float().mul_(spread)
        errors.append(_reduce(rounded.sub_(weight).square_().mul_(importance), strategy, torch.sum))
    best = torch.stack(errors).argmin(0)
    return base * torch.tensor(number.ratios, device=weight.device)[best]


def find_smoothing(weight: Tensor, mean_abs: Tensor, max_abs: Tensor, fold: Fold, *, is_static: bool) -> Tensor:
    """(K,): the scale by which inputs are divided, and the columns of ``weight`` (N, K) multiplied; 1 if none is better.

    It is x^a / w^(1 - a), w the largest weight of a column and x the size of the input: the largest for a static scale; for that
    of single tokens, which is mostly smaller, the geometric mean of largest and mean. Each a is judged by the expected squared
    error of the output, of weights and of activations rounded evenly in the range of the largest x.
    """
    size = max_abs if is_static else (max_abs * mean_abs).sqrt()
    if not size.any() or not weight.any():
        return torch.ones_like(size)
    columns = weight.abs().amax(0)
    size, columns = (values.clamp(min=float(values.max()) * LEAST) for values in (size, columns))
    best, least = torch.ones_like(size), torch.inf
    for power in (None, *POWERS):
        scale = torch.ones_like(size) if power is None else fold.pool(size**power / columns ** (1 - power))
        scale = scale / (scale.max() * scale.min()).sqrt()
        scaled = weight * scale
        steps = scaled.abs().amax(1, keepdim=True) / INT8.largest
        of_weights = float((steps.square() * (mean_abs / scale).square()).sum()) / 12
        of_inputs = float(((size / scale).max() / INT8.largest).square() * scaled.square().sum()) / 12
        if of_weights + of_inputs < least:
            best, least = scale, of_weights + of_inputs
    return best


def _reduce(values: Tensor, strategy: str, how: Callable[..., Tensor]) -> Tensor:
    """``values`` (N, K) by ``how`` (torch.amax or torch.sum) to one for each scale."""
    if strategy == "tensor":
        return how(values, (0, 1), True)
    if strategy == "channel":
        return how(values, 1, True)
    rows, columns = values.shape
    padded = nn.functional.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return how(padded.reshape(-(-rows // BLOCK), BLOCK, -1, BLOCK), (1, 3))


def _spread(scales: Tensor, weight: Tensor) -> Tensor:
    """``scales`` in a shape that broadcasts with ``weight`` (N, K)."""
    if scales.shape[1] == 1 and scales.shape[0] in (1, weight.shape[0]):
        return scales
    return scales.repeat_interleave(BLOCK, 0)[: weight.shape[0]].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
