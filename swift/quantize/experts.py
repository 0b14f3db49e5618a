"""Experts whose weights lie in one tensor, as modules of their own: a quantizer treats each of their layers by itself."""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ModelError

# E experts, K experts of a token, n tokens, D model width, I inner width

NUMBER = re.compile(r"\.(\d+)\.(?=[^.]+\.weight$)")


class Expert(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, activation: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False, device="meta")
        self.up_proj = nn.Linear(width, inner, bias=False, device="meta")
        self.down_proj = nn.Linear(inner, width, bias=False, device="meta")
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class SeparateExperts(nn.ModuleList):
    """Stands for transformers' fused experts: sum over the experts of each token, weighted by the router."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(n, D) for ``hidden`` (n, D), the experts (n, K) of each token and their weights (n, K)."""
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if len(token):
                part = expert(hidden[token]) * top_k_weights[token, place, None]
                out.index_add_(0, token, part.to(out.dtype))
        return out


def separate_experts(block: nn.Module, prefix: str, fused: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    """Replace fused experts in ``block``, called ``prefix`` in the model, which is on the meta device.

    Returns {name of a layer's weight in the model: name in the files}. ModelError for fused weights of another kind.
    """
    keys: dict[str, str] = {}
    for name, module in list(block.named_modules()):
        both = getattr(module, "gate_up_proj", None)
        whole = f"{prefix}{name}.gate_up_proj"
        if not isinstance(both, nn.Parameter) or whole not in fused:
            continue
        down = module.down_proj
        count, inner, width = both.shape[0], both.shape[1] // 2, both.shape[2]
        if (count, width, inner) != tuple(down.shape) or not hasattr(module, "act_fn"):
            raise ModelError(f"{prefix}{name}: experts of this kind are not quantized", hint=f"skip them: --quant_skip {name}")
        experts = SeparateExperts(Expert(width, inner, module.act_fn) for _ in range(count))
        parts = [*fused[whole].values(), *fused[f"{prefix}{name}.down_proj"].values()]
        for layer, sources in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
            for source in sources:
                found = NUMBER.search(source)
                if found is None:
                    raise ModelError(f"{source} does not say of which expert it is")
                keys[f"{prefix}{name}.{found[1]}.{layer}.weight"] = source
        _check(module, experts)
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, experts)
    return keys


def _check(module: nn.Module, experts: SeparateExperts) -> None:
    """ModelError unless both compute the same from the same random weights, in a small size."""
    count, width, inner = len(experts), 8, 4
    generator = torch.Generator().manual_seed(0)
    small = copy.deepcopy(module)
    both, down = (torch.randn(count, *shape, generator=generator) for shape in ((2 * inner, width), (width, inner)))
    for name, value in (("gate_up_proj", both), ("down_proj", down)):
        setattr(small, name, nn.Parameter(value, requires_grad=False))
    own = SeparateExperts(Expert(width, inner, experts[0].act_fn) for _ in range(count))
    for number, expert in enumerate(own):
        for layer, value in (("gate_proj", both[number, :inner]), ("up_proj", both[number, inner:]), ("down_proj", down[number])):
            getattr(expert, layer).weight = nn.Parameter(value, requires_grad=False)
    hidden = torch.randn(6, width, generator=generator)
    index = torch.stack([torch.randperm(count, generator=generator)[: min(2, count)] for _ in range(6)])
    weights = torch.rand(index.shape, generator=generator)
    with torch.inference_mode():
        wanted, found = small(hidden, index, weights), own(hidden, index, weights)
    if not torch.allclose(wanted, found, rtol=1e-4, atol=1e-4):
        raise ModelError("its experts compute otherwise than down(act(gate(x)) * up(x))", hint="skip them with --quant_skip experts")
