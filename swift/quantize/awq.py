"""AWQ: inputs that matter are made smaller and their weights larger, so that rounding hurts them less.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv 2306.00978. The scale of each
input is searched for as there, but with the exact loss tr(D H D'), D the error of the weights and H the mean of x x', which is the
mean squared error of the output over the calibration text; and weights are rounded as by GPTQ, while scales are compared too.
"""

import torch
from torch import Tensor, nn

from swift.config.export import ExportConfig
from swift.model.quantized.base import GroupedWeight, Settings, Weight
from swift.quantize.base import Inputs
from swift.quantize.folds import Fold
from swift.quantize.gptq import inverse_factor, round_columns
from swift.quantize.grid import find_grid, num_groups, round_to
from swift.quantize.refine import refine

# N outputs, K inputs, G groups, C scales that are compared, R rows that compare them

ROWS = 64
LEAST = 1e-4  # of the mean: inputs that are smaller are scaled as if they were so large
POWERS = tuple((a, b) for b in (0.0, 0.5, 1.0) for a in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6))


class Awq:
    """The quantizer; ``settings`` say bits and groups, ``damp`` is that of GPTQ's rounding."""

    needs = frozenset({"hessian"})

    def __init__(self, settings: Settings, damp: float) -> None:
        self.settings = settings
        self.damp = damp

    def quantize(self, layers: dict[str, nn.Linear], inputs: Inputs) -> dict[str, Weight]:
        """See Quantizer: where nothing can be scaled, this is GPTQ with zero points."""
        weight = _together(layers)
        return _split(layers, self._rounding(weight, inputs).round(weight, torch.ones(weight.shape[1], device=weight.device)))

    def quantize_scaled(
        self, block: nn.Module, layers: dict[str, nn.Linear], inputs: Inputs, fold: Fold, made: dict[str, Weight], dtype: torch.dtype
    ) -> tuple[dict[str, Weight], Tensor]:
        """See ScalingQuantizer."""
        weight = _together(layers)
        rounding = self._rounding(weight, inputs)
        scale = fold.divide(block, find_scale(weight, rounding, fold), dtype, made)
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.mul_(scale)
        return _split(layers, rounding.round(weight, scale)), scale

    def _rounding(self, weight: Tensor, inputs: Inputs) -> "Rounding":
        hessian = torch.eye(weight.shape[1], device=weight.device) if inputs.hessian is None else inputs.hessian
        return Rounding(hessian, self.settings, self.damp)


def make(config: ExportConfig, settings: Settings) -> Awq:
    return Awq(settings, config.damp_percent)


class Rounding:
    """Rounds weights for inputs with the mean ``hessian`` (K, K) of x x', divided by a scale.

    A step of the scaled weight is a step of the weight itself, divided by the scale of its input. So errors of all scales are
    carried over by one and the same factor.
    """

    def __init__(self, hessian: Tensor, settings: Settings, damp: float) -> None:
        self.hessian, self.settings = hessian, settings
        self.order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        self.factor = inverse_factor(hessian[self.order][:, self.order], damp)

    def round(self, weight: Tensor, scale: Tensor) -> GroupedWeight:
        """``weight`` (N, K) times ``scale`` (K,) in few bits: the better of rounding to the nearest and of GPTQ."""
        carried = refine(weight * scale, self.hessian / scale / scale[:, None], self.carry(weight, scale[None]))
        nearest = self._nearest(weight, scale)
        carried_loss, nearest_loss = (self.losses(weight, found, scale[None]).sum() for found in (carried, nearest))
        return carried if carried_loss <= nearest_loss else nearest

    def carry(self, weight: Tensor, scales: Tensor) -> GroupedWeight:
        """(C * N, K): ``weight`` (N, K) times each of ``scales`` (C, K), with errors carried over."""
        parts = [self._nearest(weight, scale) for scale in scales]
        grid_scales, zeros = torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts])
        group_of = parts[0].group_of_inputs()[self.order]
        steps = grid_scales[:, group_of] / scales[:, self.order].repeat_interleave(len(weight), 0)
        most = 2**self.settings.bits - 1
        ordered = round_columns(weight[:, self.order].repeat(len(scales), 1), self.factor, steps, zeros[:, group_of].float(), most)
        return GroupedWeight(ordered[:, self.order.argsort()], grid_scales, zeros, self.settings.bits, self.settings.symmetric)

    def losses(self, weight: Tensor, found: GroupedWeight, scales: Tensor) -> Tensor:
        """(C,): tr(D H D') of ``found``, which is ``weight`` (N, K) times each of ``scales`` (C, K) in few bits."""
        rounded = found.dequantize().reshape(len(scales), *weight.shape) / scales[:, None]
        difference = rounded.sub_(weight)
        squares: Tensor = torch.linalg.vecdot(difference @ self.hessian, difference)
        return squares.sum(-1)

    def _nearest(self, weight: Tensor, scale: Tensor) -> GroupedWeight:
        bits, symmetric = self.settings.bits, self.settings.symmetric
        scaled = weight * scale
        grid = find_grid(scaled, bits, self.settings.group_size, symmetric, self.hessian.diagonal().clamp(min=0).sqrt() / scale)
        return GroupedWeight(round_to(scaled, *grid, bits), *grid, bits, symmetric)


def find_scale(weight: Tensor, rounding: Rounding, fold: Fold) -> Tensor:
    """(K,): the scale with the least loss found for ``weight`` (N, K).

    Tried are r^a / w^b, r the root mean square of an input and w the mean of its weights relative to the largest of their group
    (AWQ's own are b = 0 and b = 1 - a), with some rows of the weight. a = b = 0 leaves inputs as they are.
    """
    size = rounding.hessian.diagonal().clamp(min=0).sqrt()
    parts = weight.abs().reshape(len(weight), num_groups(weight.shape[1], rounding.settings.group_size), -1)
    relative = (parts / parts.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).flatten(1).mean(0)
    if not size.any() or not relative.any():
        return torch.ones_like(size)
    size, relative = (fold.pool(values).clamp(min=float(values.mean()) * LEAST) for values in (size, relative))
    candidates = torch.stack([size**a / relative**b for a, b in POWERS])
    candidates /= (candidates.amax(-1, keepdim=True) * candidates.amin(-1, keepdim=True)).sqrt()
    chosen = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:ROWS]
    some = weight[chosen.to(weight.device)]
    return candidates[rounding.losses(some, rounding.carry(some, candidates), candidates).argmin()]


def _together(layers: dict[str, nn.Linear]) -> Tensor:
    """(N, K) of all ``layers``."""
    return torch.cat([layer.weight.detach().float() for layer in layers.values()])


def _split(layers: dict[str, nn.Linear], found: GroupedWeight) -> dict[str, Weight]:
    sizes = [layer.out_features for layer in layers.values()]
    codes, scales, zeros = (tensor.split(sizes) for tensor in (found.codes, found.scales, found.zeros))
    return {
        name: GroupedWeight(codes[at].clone(), scales[at].clone(), zeros[at].clone(), found.bits, found.symmetric)
        for at, name in enumerate(layers)
    }
