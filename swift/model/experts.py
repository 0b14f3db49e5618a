"""Experts whose weights lie in one tensor, as modules of their own: each of their layers is quantized, and read, by itself."""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ModelError

# E experts, K experts of a token, n tokens, D model width, I inner width

NUMBER = re.compile(r"\.(\d+)\.([^.]+)\.weight$")
Fused = dict[str, dict[str, list[str]]]
"""{fused weight in the model: {pattern: names of its parts in the files}}, patterns in the order in which parts are joined."""


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)); ``names`` are those of the three layers gate, up and down."""

    def __init__(self, width: int, inner: int, activation: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        self.act_fn = activation
        for name, (inputs, outputs) in zip(names, ((width, inner), (width, inner), (inner, width)), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        out: Tensor = down(self.act_fn(gate(x)) * up(x))
        return out


class SeparateExperts(nn.ModuleList):
    """Stands for transformers' fused experts: sum over the experts of each token, weighted by the router.

    Tokens that are not ``valid`` (n,) get no expert: what pads a batch would be seen as input otherwise.
    """

    valid: Tensor | None = None

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(n, D) for ``hidden`` (n, D), the experts (n, K) of each token and their weights (n, K)."""
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            chosen = top_k_index == number
            token, place = torch.where(chosen if self.valid is None else chosen & self.valid[:, None])
            if len(token):
                part = expert(hidden[token]) * top_k_weights[token, place, None]
                out.index_add_(0, token, part.to(out.dtype))
        return out


def find_names(model: Any, stored: Iterable[str]) -> tuple[dict[str, str], Fused]:
    """({weight in the model: its name among ``stored``, the names in the files}, the fused ones).

    By transformers' own rules of renaming and joining.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings: Any = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    order = [pattern for converter in converters for pattern in converter.source_patterns]
    state = model.state_dict()
    names: dict[str, str] = {}
    fused: Fused = {}
    for key in stored:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            names[name] = key
        else:
            fused.setdefault(name, {}).setdefault(pattern, []).append(key)
    return names, {name: dict(sorted(parts.items(), key=lambda item: order.index(item[0]))) for name, parts in fused.items()}


def separate_experts(root: nn.Module, prefix: str, fused: Fused) -> dict[str, str]:
    """Replace fused experts in ``root``, called ``prefix`` in the model, by SeparateExperts on the meta device.

    Their layers are called as in the files. Returns {weight in the model: its name in the files}. ModelError for fused weights
    of another kind.
    """
    keys: dict[str, str] = {}
    for name, module in list(root.named_modules()):
        both = getattr(module, "gate_up_proj", None)
        whole, last = f"{prefix}{name}.gate_up_proj", f"{prefix}{name}.down_proj"
        if not isinstance(both, nn.Parameter) or whole not in fused:
            continue
        down = module.down_proj
        count, inner, width = both.shape[0], both.shape[1] // 2, both.shape[2]
        parts = [*fused[whole].values(), *fused.get(last, {}).values()]
        if (count, width, inner) != tuple(down.shape) or not hasattr(module, "act_fn") or len(parts) != 3:
            raise ModelError(f"{prefix}{name}: experts of this kind cannot be quantized")
        layers: list[str] = []
        for sources in parts:
            for source in sources:
                found = NUMBER.search(source)
                if found is None:
                    raise ModelError(f"{source} does not say of which expert it is")
                keys[f"{prefix}{name}.{found[1]}.{found[2]}.weight"] = source
                layer = found[2]
            layers.append(layer)
        names = (layers[0], layers[1], layers[2])
        _check(module, names)
        experts = SeparateExperts(Expert(width, inner, module.act_fn, names) for _ in range(count))
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, experts)
    return keys


def _check(module: nn.Module, names: tuple[str, str, str]) -> None:
    """ModelError unless the fused ``module`` and separate experts compute the same from the same random weights, in a small size."""
    count, width, inner = 4, 8, 4
    cpu = torch.device("cpu")  # a loader may have made another device the usual one
    generator = torch.Generator().manual_seed(0)
    small: Any = copy.deepcopy(module)
    if hasattr(small, "config"):
        small.config = copy.copy(small.config)
        small.config._experts_implementation = "eager"  # the plain loop over experts, which every precision and device has
    for attribute in ("num_experts", "num_local_experts"):
        if hasattr(small, attribute):
            setattr(small, attribute, count)
    both, down = (torch.randn(count, *shape, generator=generator, device=cpu) for shape in ((2 * inner, width), (width, inner)))
    for name, value in (("gate_up_proj", both), ("down_proj", down)):
        setattr(small, name, nn.Parameter(value, requires_grad=False))
    own = SeparateExperts(Expert(width, inner, small.act_fn, names) for _ in range(count))
    for number, expert in enumerate(own):
        for layer, value in zip(names, (both[number, :inner], both[number, inner:], down[number]), strict=True):
            getattr(expert, layer).weight = nn.Parameter(value, requires_grad=False)
    hidden = torch.randn(6, width, generator=generator, device=cpu)
    index = torch.stack([torch.randperm(count, generator=generator, device=cpu)[:2] for _ in range(6)])
    weights = torch.rand(index.shape, generator=generator, device=cpu)
    with torch.inference_mode(), cpu:
        wanted, found = small(hidden, index, weights), own(hidden, index, weights)
    if not torch.allclose(wanted, found, rtol=1e-4, atol=1e-4):
        raise ModelError("its experts compute otherwise than down(act(gate(x)) * up(x))")
