"""GPTQ: columns are rounded one after the other, and what is left of each error is carried over to those that follow.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323.
The columns come in the order of their importance (the diagonal of the Hessian); their groups are those of the original order,
so that the file needs no table of groups, unless desc_act asks for it. Then scales and codes are fitted once more (refine.py).
"""

import torch
from torch import Tensor, nn

from swift.config.export import ExportConfig
from swift.errors import ModelError
from swift.model.quantized import FORMATS
from swift.model.quantized.base import GroupedWeight, Settings, Weight
from swift.quantize.base import Inputs
from swift.quantize.grid import find_grid
from swift.quantize.refine import refine

# N outputs, K inputs, G groups, C columns of a part

COLUMNS = 128  # whose errors are carried over to the rest in one product
NEEDS = frozenset({"hessian"})


class Gptq:
    """The quantizer; ``settings`` say bits, groups and zero points."""

    needs = NEEDS

    def __init__(self, settings: Settings, damp: float, least_zero: int = 0) -> None:
        self.settings = settings
        self.damp = damp
        self.least_zero = least_zero

    def quantize(self, layers: dict[str, nn.Linear], inputs: Inputs) -> dict[str, Weight]:
        weights = [layer.weight.detach().float() for layer in layers.values()]
        whole = torch.cat(weights)
        hessian = inputs.hessian if inputs.hessian is not None else torch.eye(whole.shape[1], device=whole.device)
        found = gptq(whole, hessian, self.settings, self.damp, self.least_zero)
        del whole
        made: dict[str, Weight] = {}
        begin = 0
        for name, weight in zip(layers, weights, strict=True):
            rows = slice(begin, begin + len(weight))
            made[name] = GroupedWeight(
                found.codes[rows].clone(), found.scales[rows].clone(), found.zeros[rows].clone(), found.bits, found.symmetric, found.groups
            )
            begin += len(weight)
        return made


def make(config: ExportConfig, settings: Settings) -> Gptq:
    least_zero = FORMATS.get(config.quant_format).least_zero if config.quant_format else 0
    return Gptq(settings, config.damp_percent, least_zero)


def gptq(weight: Tensor, hessian: Tensor, settings: Settings, damp: float, least_zero: int = 0) -> GroupedWeight:
    """Codes for ``weight`` (N, K) that keep tr(D H D'), D the error, small, for the mean H (K, K) of x x'."""
    inputs = weight.shape[1]
    size = settings.group_size if settings.group_size > 0 else inputs
    importance = hessian.diagonal().clone()
    weight = weight.clone()
    weight[:, importance == 0] = 0  # inputs that are always zero
    # Between plain least squares and the diagonal of the Hessian: errors are carried over, but not between all inputs.
    weighting = importance.sqrt()
    order = torch.argsort(importance, descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damp)
    ordered = weight[:, order]
    columns = torch.arange(inputs, device=weight.device) // size
    if settings.desc_act:
        scales, zeros = find_grid(ordered, settings.bits, size, settings.symmetric, weighting[order], least_zero=least_zero)
        group_of = columns
    else:
        scales, zeros = find_grid(weight, settings.bits, size, settings.symmetric, weighting, least_zero=least_zero)
        group_of = columns[order]
    codes = round_columns(ordered, factor, scales[:, group_of], zeros[:, group_of].float(), 2**settings.bits - 1)
    back = order.argsort()
    groups = columns[back].int() if settings.desc_act else None
    return refine(weight, hessian, GroupedWeight(codes[:, back], scales, zeros, settings.bits, settings.symmetric, groups))


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U (K, K), upper triangular, with U' U the inverse of the damped ``hessian``. ModelError if there is none."""
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    for share in (damp, 0.01, 0.1, 1.0):
        if share < damp:
            continue
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        damped.diagonal()[hessian.diagonal() == 0] = mean
        # Of the matrix read from its end the factor is R' with H = R R', R upper triangular; U is the inverse of R.
        lower, fault = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if fault == 0:
            upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(damped), device=damped.device), upper=True)
            if bool(torch.isfinite(upper).all()):
                return upper
    raise ModelError("the inputs of a layer cannot be told apart (no Cholesky factor)", hint="calibrate with more data: --quant_n_samples")


def round_columns(weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, most: int) -> Tensor:
    """Codes (N, K) uint8; ``weight`` (N, K) is used up; ``scales`` and ``zeros`` (N, K) are those of each column."""
    codes = torch.empty_like(weight, dtype=torch.uint8)
    # Columns as rows: what one step reads and writes lies together.
    rest_KN = weight.T.contiguous()
    codes_KN = torch.empty_like(rest_KN, dtype=torch.uint8)
    scales_KN, zeros_KN = scales.T.contiguous(), zeros.T.contiguous()
    inputs = len(rest_KN)
    pivots = factor.diagonal().tolist()
    columns = list(zip(rest_KN.unbind(), scales_KN.unbind(), zeros_KN.unbind(), codes_KN.unbind(), pivots, strict=True))
    for begin in range(0, inputs, COLUMNS):
        end = min(inputs, begin + COLUMNS)
        errors_CN = torch.empty_like(rest_KN[begin:end])
        for place, into in zip(range(begin, end), errors_CN.unbind(), strict=True):
            column, scale, zero, code, pivot = columns[place]
            whole = torch.div(column, scale).add_(zero).round_().clamp_(0, most)
            code.copy_(whole)
            error = torch.sub(column, whole.sub_(zero).mul_(scale), out=into).div_(pivot)
            if place + 1 < end:
                rest_KN[place + 1 : end].addr_(factor[place, place + 1 : end], error, alpha=-1)
        if end < inputs:
            rest_KN[end:].addmm_(factor[begin:end, end:].T, errors_CN, alpha=-1)
    codes.copy_(codes_KN.T)
    return codes
