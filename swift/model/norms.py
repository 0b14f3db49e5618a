"""RMSNorm with fewer passes over memory, for the modules of any model that turn out to be one.

transformers writes it as six operations forward, which autograd turns into as many again. On a CPU each reads and writes
the whole of its input: here it is three forward and five backward, a third of the time.
"""

from typing import Any

import torch
from torch import Tensor, nn


def use_lean_norms(model: Any) -> int:
    """Replace the forward passes of ``model``'s RMSNorms in float32 on a CPU; how many. Which ones they are is tried."""
    count = 0
    for module in model.modules():
        if (found := _as_rms_norm(module)) is not None:
            module.forward = _LeanForward(module, *found, module.forward)
            count += 1
    return count


def rms_norm_of(module: nn.Module) -> tuple[Tensor, float] | None:
    """Weight (D,) and epsilon of ``module``, if it turns out to be an RMSNorm in float32 on a CPU; else None."""
    found = _as_rms_norm(module)
    if found is None:
        return None
    weight: Any = module.weight
    return weight.detach() + found[1], found[0]


def _as_rms_norm(module: Any) -> tuple[float, float] | None:
    """Epsilon, and what is added to the weight."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(epsilon, float) or any(module.children()):
        return None
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or len(list(module.parameters())) != 1:
        return None
    offset = _offset(module, weight, epsilon)
    return None if offset is None else (epsilon, offset)


def _offset(module: nn.Module, weight: Tensor, epsilon: float) -> float | None:
    """What is added to the weight (Gemma's norms scale by 1 + weight); None if ``module`` is no RMSNorm."""
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = module(x)
        if not isinstance(wanted, Tensor) or wanted.shape != x.shape:
            return None
        for offset in (0.0, 1.0):
            found = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (weight + offset)
            if torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
                return offset
    return None


class _LeanForward:
    """Takes the place of an RMSNorm's forward method; other precisions than float32 keep the model's own."""

    def __init__(self, module: Any, epsilon: float, offset: float, original: Any) -> None:
        self.module, self.epsilon, self.offset, self.original = module, epsilon, offset, original

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.module.weight
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
            plain: Tensor = self.original(x)
            return plain
        weight = weight + self.offset if self.offset else weight
        normed, scale = _RmsNorm.apply(x, weight, self.epsilon)
        normed.recipe = (x.detach(), scale, weight.detach())
        out: Tensor = normed
        return out


def recipe(normed: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """What ``normed`` is the product of, bit for bit, if a lean norm made it: its input, (.., 1), and (D,).

    Whoever needs it in the backward pass keeps these, which are kept anyway, and not another copy.
    """
    return getattr(normed, "recipe", None)


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        scale: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        ctx.mark_non_differentiable(scale)
        return (x * scale).mul_(weight), scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        width = x.shape[-1]
        product, dx, dweight = grad * x, None, None
        if needs_weight:  # einsum would take a product of vectors for each column
            dweight = torch.mv(product.reshape(-1, width).T, scale.reshape(-1))
        if needs_x:
            along = torch.mv(product.reshape(-1, width), weight).view(scale.shape).mul_(scale.pow(3).div_(-width))
            dx = torch.addcmul(torch.mul(grad, weight, out=product).mul_(scale), x, along)
        return dx, dweight, None
