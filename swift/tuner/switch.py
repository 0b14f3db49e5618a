"""A model without its adapter, or with another one, for a while.

PEFT's own switches also change which parameters ask for a gradient, which a step that is under way must not see: a graph,
an optimizer and sharded parameters are built on it. Here nothing changes but what a forward pass computes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


def switchable(model: Any) -> list[Any]:
    """The modules of ``model`` that compute with an adapter, or in place of a module that is trained whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextlib.contextmanager
def without_adapter(modules: list[Any]) -> Iterator[None]:
    """Within, ``modules`` (as ``switchable`` gives them) compute what they did before there was an adapter."""
    before = [module._disable_adapters for module in modules]
    try:
        for module in modules:
            module._disable_adapters = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module._disable_adapters = value


@contextlib.contextmanager
def with_adapter_named(modules: list[Any], name: str) -> Iterator[None]:
    """Within, ``modules`` compute with the adapter ``name``; those that it does not touch, without any."""
    before = [module._active_adapter for module in modules]
    try:
        for module in modules:
            module._active_adapter = [name]
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module._active_adapter = value
