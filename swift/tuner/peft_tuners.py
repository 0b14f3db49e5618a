"""Tuners that PEFT has: one table of its config classes and of our options that fill them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from swift.config.tuner import TunerConfig
from swift.errors import ConfigError
from swift.model.device import DTYPES
from swift.tuner.adapter import compile_nothing_for_boft, load_adapter_weights, save_adapter

Fields = Callable[[TunerConfig, Any], dict[str, Any]]

# tuner -> PEFT's config class, and its fields from our options and the model
KINDS: dict[str, tuple[str, Fields]] = {
    "lora": (
        "LoraConfig",
        lambda config, model: dict(
            r=config.lora_rank,
            lora_alpha=_whole(config.lora_alpha),
            lora_dropout=config.lora_dropout,
            bias=config.lora_bias,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        ),
    ),
    "adalora": (
        "AdaLoraConfig",
        lambda config, model: dict(
            target_r=config.adalora_target_r,
            init_r=config.adalora_init_r,
            tinit=config.adalora_tinit,
            tfinal=config.adalora_tfinal,
            deltaT=config.adalora_deltaT,
            beta1=config.adalora_beta1,
            beta2=config.adalora_beta2,
            orth_reg_weight=config.adalora_orth_reg_weight,
            lora_alpha=_whole(config.lora_alpha),
            lora_dropout=config.lora_dropout,
            bias=config.lora_bias,
        ),
    ),
    "vera": (
        "VeraConfig",
        lambda config, model: dict(
            r=config.vera_rank,
            projection_prng_key=config.vera_projection_prng_key,
            vera_dropout=config.vera_dropout,
            d_initial=config.vera_d_initial,
        ),
    ),
    "boft": (
        "BOFTConfig",
        lambda config, model: dict(
            boft_block_size=config.boft_block_size,
            boft_block_num=config.boft_block_num,
            boft_n_butterfly_factor=config.boft_n_butterfly_factor,
            boft_dropout=config.boft_dropout,
        ),
    ),
    "fourierft": (
        "FourierFTConfig",
        lambda config, model: dict(n_frequency=config.fourier_n_frequency, scaling=config.fourier_scaling),
    ),
    "ia3": (
        "IA3Config",
        lambda config, model: dict(feedforward_modules=config.ia3_feedforward_modules or feedforward_outputs(model)),
    ),
}


class PeftTuner:
    """An adapter of the frozen model; which one, --tuner_type says."""

    def apply(self, model: Any, config: TunerConfig, *, total_steps: int | None = None) -> Any:
        """Wrap ``model`` in a PeftModel whose adapter is trained; the adapter is float32 unless lora_dtype says else."""
        import peft

        if config.tuner_type == "boft":
            _check_boft(config)
        name, fields = KINDS[config.tuner_type]
        targets: Any = config.target_regex or config.target_modules
        try:
            settings = getattr(peft, name)(
                task_type="CAUSAL_LM",
                target_modules="all-linear" if targets == ["all-linear"] else targets,
                modules_to_save=config.modules_to_save or None,
                **fields(config, model),
                **self.more_fields(config, total_steps),
            )
            with warnings.catch_warnings():
                # On a CPU there is one factor alone, which _check_boft has made sure of.
                warnings.filterwarnings("ignore", message=".*boft_n_butterfly_factor.*")
                tuned = peft.get_peft_model(model, settings)
        except (ValueError, NotImplementedError, ZeroDivisionError) as problem:
            text = str(problem).strip().splitlines()[0]
            raise ConfigError(f"--tuner_type {config.tuner_type} cannot be put on this model: {text}", hint=_targets_hint(model)) from None
        if config.lora_dtype is not None:
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(DTYPES[config.lora_dtype])
        return tuned

    def more_fields(self, config: TunerConfig, total_steps: int | None) -> dict[str, Any]:
        """Fields that the table does not fill."""
        return {}

    def save(self, model: Any, path: Path, *, max_shard_size: str) -> None:
        save_adapter(model, path)

    def kept(self, model: Any) -> set[str] | None:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return trained | {name for name in model.state_dict() if model.base_model.prefix in name}

    def load(self, model: Any, path: Path) -> None:
        load_adapter_weights(model, path)

    def attach(self, model: Any, optimizer: Optimizer, step: Callable[[], int]) -> None:
        """Nothing happens between two steps."""


def feedforward_outputs(model: Any) -> list[str]:
    """Names of the linear layers outside attention that lead back to the model's width."""
    width = model.get_input_embeddings().weight.shape[1]
    attention = [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == width
        and module is not model.get_output_embeddings()
        and not any(name.startswith(f"{place}.") for place in attention)
    ]
    if not found:
        raise ConfigError("IA3 finds no feed-forward layers in this model", hint="name them by --ia3_feedforward_modules")
    return found


def _check_boft(config: TunerConfig) -> None:
    compile_nothing_for_boft()
    if config.boft_n_butterfly_factor > 1 and not torch.cuda.is_available():
        raise ConfigError(
            f"--boft_n_butterfly_factor {config.boft_n_butterfly_factor} needs a CUDA GPU: PEFT computes one factor elsewhere",
            hint="remove it",
        )


def _whole(alpha: float) -> float:
    """PEFT declares lora_alpha as a whole number, and saves it as it gets it."""
    return int(alpha) if alpha % 1 == 0 else alpha


def _targets_hint(model: Any) -> str:
    linear = (name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return "it has these linear layers: " + ", ".join(dict.fromkeys(linear))
