"""Optimizers and learning-rate schedules."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from swift.config.train import StepsConfig
from swift.errors import ConfigError


def make_optimizer(model: Any, config: StepsConfig, *, lorap_lr_ratio: float | None = None) -> Optimizer:
    """The optimizer over the trained parameters; LoRA's B matrices learn ``lorap_lr_ratio`` times as fast (LoRA+)."""
    groups = parameter_groups(model, config, lorap_lr_ratio)
    learning_rate = config.learning_rate
    assert learning_rate is not None
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    if config.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    fused = config.optim == "adamw_torch_fused"
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=config.adam_epsilon, fused=fused)


def parameter_groups(model: Any, config: StepsConfig, lorap_lr_ratio: float | None) -> list[dict[str, Any]]:
    """Trained parameters by weight decay (none on biases and norms) and learning rate; empty groups are left out."""
    undecayed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_fast = lorap_lr_ratio is not None and ("lora_B" in name or "lora_embedding_B" in name)
            groups.setdefault((name not in undecayed, is_fast), []).append(parameter)
    rate = config.learning_rate
    assert rate is not None
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "lr": rate * (lorap_lr_ratio or 1.0) if is_fast else rate,
        }
        for (is_decayed, is_fast), parameters in groups.items()
    ]


def warmup_steps(config: StepsConfig, total: int) -> int:
    """Steps in which the rate rises: --warmup_steps (a share of ``total`` below 1), else --warmup_ratio of ``total``."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil(total * (config.warmup_steps or config.warmup_ratio))


def make_schedule(optimizer: Optimizer, config: StepsConfig, total: int) -> Any:
    """transformers' schedule of that name over ``total`` steps."""
    from transformers.optimization import get_scheduler

    settings: dict[str, Any] = dict(config.lr_scheduler_kwargs or {})
    if "num_cycles" in settings and config.lr_scheduler_type == "cosine_with_restarts":
        settings["num_cycles"] = int(settings["num_cycles"])
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(config, total),
            num_training_steps=total,
            scheduler_specific_kwargs=settings,
        )
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"--lr_scheduler_kwargs does not fit {config.lr_scheduler_type}: {problem}") from None
