"""Optimizers and learning-rate schedules."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from swift import console, deps
from swift.config.optim import BITSANDBYTES
from swift.config.train import StepsConfig
from swift.errors import ConfigError
from swift.train.galore import GaLoreAdamW
from swift.train.together import Together

Groups = list[dict[str, Any]]
# --optim, without paged_ and the bits -> class of bitsandbytes. All of them run on a CPU too.
BITSANDBYTES_CLASSES = {"adamw": "AdamW", "adamw_bnb": "AdamW", "lion": "Lion", "ademamix": "AdEMAMix", "rmsprop_bnb": "RMSprop"}


def make_optimizer(model: Any, config: StepsConfig, *, lorap_lr_ratio: float | None = None) -> Optimizer:
    """The optimizer over the trained parameters; LoRA's B matrices learn ``lorap_lr_ratio`` times as fast (LoRA+)."""
    name, rate = config.optim, config.learning_rate
    assert rate is not None
    adam: dict[str, Any] = {"lr": rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if name == "galore_adamw":
        return _galore(model, config, adam)
    if name == "muon":
        return _muon(model, config, adam, lorap_lr_ratio)
    if name in BITSANDBYTES:
        return _bitsandbytes(model, config, adam, lorap_lr_ratio)
    groups = parameter_groups(model, config, lorap_lr_ratio)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    if name == "adagrad":
        return torch.optim.Adagrad(groups, lr=rate)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate)
    return torch.optim.AdamW(groups, **adam, fused=name == "adamw_torch_fused")


def parameter_groups(model: Any, config: StepsConfig, lorap_lr_ratio: float | None, *, only: set[str] | None = None) -> Groups:
    """Trained parameters by weight decay (none on biases and norms) and learning rate; empty groups are left out.

    ``only`` restricts them to these names.
    """
    undecayed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
    }
    groups: dict[tuple[bool, bool, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (only is None or name in only):
            is_fast = lorap_lr_ratio is not None and ("lora_B" in name or "lora_embedding_B" in name)
            # Optimizers step a group at once, and cannot do so with tensors that are spread over other processes, or over none.
            groups.setdefault((name not in undecayed, is_fast, getattr(parameter, "device_mesh", None)), []).append(parameter)
    rate = config.learning_rate
    assert rate is not None
    return [
        {
            "params": parameters,
            "kind": f"{'decayed' if is_decayed else 'undecayed'}{', fast' if is_fast else ''}",  # the same, however they are spread
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "lr": rate * (lorap_lr_ratio or 1.0) if is_fast else rate,
        }
        for (is_decayed, is_fast, _), parameters in groups.items()
    ]


def hidden_matrices(model: Any) -> set[str]:
    """Names of the trained weights of linear layers, the head left out."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad
    }


def _bitsandbytes(model: Any, config: StepsConfig, adam: dict[str, Any], lorap_lr_ratio: float | None) -> Optimizer:
    """As Hugging Face has it: with 8 bits, the state of embeddings, whose gradients are few and large, keeps 32."""
    bnb = deps.require("bitsandbytes", extra="bnb")
    name = config.optim.removeprefix("paged_")
    is_paged = name != config.optim
    if is_paged and next(model.parameters()).device.type == "cpu":
        console.notice(f"--optim {config.optim} on a CPU is the optimizer without paging: its state is in main memory anyway")
        is_paged = False
    kind = name.removesuffix("_8bit").removesuffix("_32bit")
    arguments: dict[str, Any] = {"lr": adam["lr"]}
    if not kind.startswith("rmsprop"):
        arguments |= {"betas": adam["betas"], "is_paged": is_paged}
    if kind.startswith("adam"):
        arguments["eps"] = adam["eps"]
    if kind == "ademamix":
        arguments = {**arguments, "betas": (*adam["betas"], 0.9999)}
    names = {each for each, _ in model.named_parameters()}
    embeddings = {f"{each}.weight" for each, module in model.named_modules() if isinstance(module, nn.Embedding)} & names
    shares = {8: names - embeddings, 32: embeddings} if name.endswith("_8bit") else {32: names}
    parts = []
    for bits, only in shares.items():
        if groups := parameter_groups(model, config, lorap_lr_ratio, only=only):
            parts.append(getattr(bnb.optim, BITSANDBYTES_CLASSES[kind])(groups, optim_bits=bits, **arguments))
    return parts[0] if len(parts) == 1 else Together(parts)


def _muon(model: Any, config: StepsConfig, adam: dict[str, Any], lorap_lr_ratio: float | None) -> Optimizer:
    """Muon for hidden matrices, scaled so that AdamW's learning rates fit (Liu et al. 2025, arXiv:2502.16982), AdamW for the rest."""
    matrices = hidden_matrices(model)
    others = {name for name, _ in model.named_parameters()} - matrices
    first = parameter_groups(model, config, lorap_lr_ratio, only=matrices)
    second = parameter_groups(model, config, lorap_lr_ratio, only=others)
    parts: list[Optimizer] = []
    if first:
        parts.append(torch.optim.Muon(first, lr=adam["lr"], adjust_lr_fn="match_rms_adamw"))
    if second:
        parts.append(torch.optim.AdamW(second, **adam))
    return Together(parts)


def _galore(model: Any, config: StepsConfig, adam: dict[str, Any]) -> Optimizer:
    matrices = hidden_matrices(model)
    if config.galore_target_modules:
        matrices = {name for name in matrices if any(target in name for target in config.galore_target_modules)}
        if not matrices:
            raise ConfigError(f"--galore_target_modules {' '.join(config.galore_target_modules)} names no linear layer of this model")
    if config.galore_with_embedding:
        ends = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None}
        matrices |= {name for name, parameter in model.named_parameters() if id(parameter) in ends}
    settings = {
        "rank": config.galore_rank,
        "update_proj_gap": config.galore_update_proj_gap,
        "scale": config.galore_scale,
        "proj_type": config.galore_proj_type,
    }
    projected = [group | settings for group in parameter_groups(model, config, None, only=matrices)]
    others = {name for name, _ in model.named_parameters()} - matrices
    return GaLoreAdamW(projected + parameter_groups(model, config, None, only=others), **adam)


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
