"""Adapters on disk, in PEFT's format: saved, loaded into a model, put on a model for inference."""

import json
import warnings
from pathlib import Path
from typing import Any

from swift.errors import CheckpointError, ConfigError
from swift.model.checkpoints import adapter_folder, model_reference

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What training needs to go on, where the adapter does not say it all. PEFT does not read it.
TUNER_STATE = "tuner_state.safetensors"


def base_reference(config: Any) -> str:
    """The model that ``config`` names, or that its adapter was trained on."""
    if config.model is not None:
        return model_reference(config.model)
    if not config.adapters:
        raise ConfigError("no model is given", hint="say --model PATH or --adapters RUN")
    settings = json.loads((adapter_folder(config.adapters[0]) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if not settings.get("base_model_name_or_path"):
        raise ConfigError(f"the adapter {config.adapters[0]} does not say which model it is for", hint="say --model too")
    return str(settings["base_model_name_or_path"])


def save_adapter(model: Any, path: Path, **arguments: Any) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT writes them."""
    with warnings.catch_warnings():
        # PEFT asks a hub for the base model's config to see whether the vocabulary was resized; offline it warns.
        warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
        # The trained one alone: a frozen adapter may stand beside it as a reference.
        model.save_pretrained(path, safe_serialization=True, save_embedding_layers=False, selected_adapters=["default"], **arguments)


def read_tensors(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; CheckpointError if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{file} cannot be read: {problem}") from None


def load_adapter_weights(model: Any, path: Path) -> None:
    """Put the adapter saved in ``path`` into ``model``; CheckpointError if names or shapes differ."""
    put_adapter_weights(model, read_tensors(path / ADAPTER_FILE), path)


def put_adapter_weights(model: Any, state: dict[str, Any], path: Path) -> None:
    """Put ``state``, read from ``path``, into the adapter of ``model``; CheckpointError if names or shapes differ."""
    from peft import set_peft_model_state_dict

    try:
        outcome: Any = set_peft_model_state_dict(model, state)
    except (RuntimeError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{path}: the adapter does not fit this model: {str(problem).splitlines()[-1].strip()}") from None
    if outcome.unexpected_keys:
        raise CheckpointError(f"{path}: the adapter has weights for {outcome.unexpected_keys[0]}, which this model lacks")


def with_adapter(model: Any, path: Path) -> Any:
    """``model`` with the adapter in ``path``, for inference; CheckpointError if it does not fit."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if adapter_settings(path).get("peft_type") == "BOFT":
        compile_nothing_for_boft()
    try:
        return PeftModel.from_pretrained(model, str(path), is_trainable=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        raise CheckpointError(f"{path}: the adapter cannot be loaded: {str(problem).splitlines()[0]}") from problem


def is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file()


def adapter_settings(path: Path) -> dict[str, Any]:
    """What adapter_config.json says; CheckpointError if it cannot be read."""
    try:
        settings = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} cannot be read: {problem}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path / ADAPTER_CONFIG} is not a JSON object")
    return settings


def compile_nothing_for_boft() -> None:
    """Without a CUDA GPU, keep PEFT from compiling its CUDA code for BOFT, which takes minutes and fails."""
    import torch
    from peft.tuners.boft import layer

    if not torch.cuda.is_available():
        # What PEFT remembers after a compilation that has failed, but for the warnings.
        layer._FBD_CUDA = False  # type: ignore[assignment]
