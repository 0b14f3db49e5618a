"""LoRA, through PEFT: a trained low-rank update B A of frozen linear layers."""

import warnings
from pathlib import Path
from typing import Any

import torch

from swift.config.tuner import TunerConfig
from swift.errors import CheckpointError, ConfigError
from swift.model.device import DTYPES

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


class LoraTuner:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), with rsLoRA, LoRA+ and DoRA."""

    def apply(self, model: Any, config: TunerConfig) -> Any:
        """Wrap ``model`` in a PeftModel whose adapter is trained; the adapter is float32 unless lora_dtype says else."""
        from peft import LoraConfig, get_peft_model

        targets: Any = config.target_regex or config.target_modules
        if targets == ["all-linear"]:
            targets = "all-linear"
        init: Any = {"true": True, "false": False}.get(config.init_weights, config.init_weights)
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=config.lora_alpha if config.lora_alpha % 1 else int(config.lora_alpha),  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            bias=config.lora_bias,  # type: ignore[arg-type]
            target_modules=targets,
            modules_to_save=config.modules_to_save or None,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=init,
        )
        try:
            tuned = get_peft_model(model, settings)
        except ValueError as problem:
            raise ConfigError(f"LoRA cannot be put on this model: {str(problem).splitlines()[0]}", hint=_targets_hint(model)) from None
        if config.lora_dtype is not None:
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(DTYPES[config.lora_dtype])
        return tuned

    def save(self, model: Any, path: Path, *, max_shard_size: str) -> None:
        """adapter_model.safetensors and adapter_config.json, as PEFT writes them."""
        with warnings.catch_warnings():
            # PEFT asks a hub for the base model's config to see whether the vocabulary was resized; offline it warns.
            warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
            model.save_pretrained(path, safe_serialization=True, save_embedding_layers=False)

    def load(self, model: Any, path: Path) -> None:
        load_adapter_weights(model, path)


def load_adapter_weights(model: Any, path: Path) -> None:
    """Put the adapter saved in ``path`` into ``model``; CheckpointError if names or shapes differ."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path / ADAPTER_FILE)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{path / ADAPTER_FILE} cannot be read: {problem}") from None
    try:
        outcome: Any = set_peft_model_state_dict(model, state)
    except RuntimeError as problem:
        raise CheckpointError(f"{path}: the adapter does not fit this model: {str(problem).splitlines()[-1].strip()}") from None
    if outcome.unexpected_keys:
        raise CheckpointError(f"{path}: the adapter has weights for {outcome.unexpected_keys[0]}, which this model lacks")


def with_adapter(model: Any, path: Path) -> Any:
    """``model`` with the adapter in ``path``, for inference; CheckpointError if it does not fit."""
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(model, str(path), is_trainable=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        raise CheckpointError(f"{path}: the adapter cannot be loaded: {str(problem).splitlines()[0]}") from problem


def is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file()


def _targets_hint(model: Any) -> str:
    linear = (name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return "it has these linear layers: " + ", ".join(dict.fromkeys(linear))
