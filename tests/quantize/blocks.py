"""A block of a small model with what runs it, for tests of quantizers."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.families import build

T = 24


def block_of(family: str, layer: int = 0, **options: Any) -> SimpleNamespace:
    """``block`` with random norms and biases, ``together`` and ``alone`` that run it, ``groups`` of layers that share an input."""
    model = build(family, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.rand(parameter.shape, generator=generator) * 0.5
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    block = layers[layer]
    ids = torch.arange(3, 3 + T)

    def runner(input_ids: torch.Tensor) -> Any:
        seen: list[Any] = []
        with block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True), torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
        args, kwargs = seen[0]

        def run() -> torch.Tensor:
            with torch.no_grad():
                output = block(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        return run

    together, alone = runner(ids[None]), runner(ids[:, None])
    return SimpleNamespace(block=block, together=together, alone=alone, groups=_groups(block, together))


def _groups(block: nn.Module, run: Any) -> list[list[str]]:
    by_input: dict[int, tuple[torch.Tensor, list[str]]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: by_input.setdefault(id(args[0]), (args[0], []))[1].append(name))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    run()
    for handle in handles:
        handle.remove()
    return [names for _, names in by_input.values()]
