"""LISA: full fine-tuning of a few layers at a time, drawn anew every so many steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from swift.config.tuner import TunerConfig
from swift.errors import ConfigError
from swift.tuner.blocks import blocks_of


def drawn_layers(seed: int, period: int, *, count: int, layers: int) -> list[int]:
    """Which ``count`` of ``layers`` are trained in a period: a function of its arguments, so that a resumed run draws the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + period)
    return sorted(torch.randperm(layers, generator=generator)[:count].tolist())


def train_layers_in_turn(model: Any, optimizer: Optimizer, config: TunerConfig, step: Callable[[], int]) -> None:
    """Before the first forward pass of each step, make the layers of its period the trained ones (Pan et al. 2024, arXiv:2403.17919).

    Embeddings, head and last norm are always trained. The optimizer forgets the layers that it leaves: their memory is free,
    and they start anew when they are drawn again.
    """
    layers, seed = blocks_of(model), int(getattr(config, "seed", 0))
    if config.lisa_activated_layers > len(layers):
        raise ConfigError(f"--lisa_activated_layers {config.lisa_activated_layers} are more than the model's {len(layers)} layers")
    # Those that a freeze option holds back stay frozen.
    parameters = [[parameter for parameter in layer.parameters() if parameter.requires_grad] for layer in layers]
    current: list[int] | None = None

    def switch(module: nn.Module, arguments: object) -> None:
        nonlocal current
        if not module.training:
            return
        drawn = drawn_layers(seed, step() // config.lisa_step_interval, count=config.lisa_activated_layers, layers=len(layers))
        if drawn == current:
            return
        current = drawn
        for number, members in enumerate(parameters):
            for parameter in members:
                parameter.requires_grad_(number in drawn)
                if number not in drawn:
                    optimizer.state.pop(parameter, None)

    model.get_input_embeddings().register_forward_pre_hook(switch)
