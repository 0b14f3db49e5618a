"""Full fine-tuning: the model's own weights, all or some of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from swift.config.tuner import TunerConfig
from swift.errors import CheckpointError, ConfigError
from swift.tuner.adapter import is_adapter, read_tensors
from swift.tuner.lisa import train_layers_in_turn


class FullTuner:
    """Trains every parameter that no freeze option holds back; with LISA, a few layers at a time."""

    def apply(self, model: Any, config: TunerConfig, *, total_steps: int | None = None) -> Any:
        """``model`` itself with requires_grad set; ConfigError if nothing is left to train."""
        self.config = config
        frozen = _frozen_by_ratio(model, config.freeze_parameters_ratio)
        for name, parameter in model.named_parameters():
            freeze = name in frozen or _matches(name, config.freeze_parameters, config.freeze_parameters_regex)
            unfreeze = _matches(name, config.trainable_parameters, config.trainable_parameters_regex)
            parameter.requires_grad_(unfreeze or not freeze)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("all parameters are frozen: there is nothing to train", hint="freeze fewer of them")
        return model

    def save(self, model: Any, path: Path, *, max_shard_size: str) -> None:
        """Safetensors and config, as transformers writes them."""
        model.save_pretrained(path, safe_serialization=True, max_shard_size=max_shard_size)

    def kept(self, model: Any) -> set[str] | None:
        return None

    def load(self, model: Any, path: Path) -> None:
        if is_adapter(path):
            raise CheckpointError(f"{path}: it holds an adapter, and not the weights of a model", hint="leave --tuner_type away")
        state: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            state.update(read_tensors(file))
        names, own = set(state), model.state_dict(keep_vars=True)
        for name in names & own.keys():
            target, tensor = own[name], state[name]
            if (target.shape, target.dtype, target.device) == (tensor.shape, tensor.dtype, tensor.device):
                target.data = state.pop(name)  # mapped from the file: memory is taken where it is changed
        try:
            outcome = model.load_state_dict(state, strict=False)
        except RuntimeError as problem:
            first = str(problem).splitlines()[1].strip()
            raise CheckpointError(f"{path}: the weights do not fit this model: {first}") from None
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        other = [name for name in outcome.missing_keys if name not in tied | names] + list(outcome.unexpected_keys)
        if other:
            model.load_state_dict(_as_modules_have_it(model, path, other[0]))
        model.tie_weights()

    def attach(self, model: Any, optimizer: Optimizer, step: Callable[[], int]) -> None:
        if self.config.lisa_activated_layers:
            train_layers_in_turn(model, optimizer, self.config, step)


def _as_modules_have_it(model: Any, path: Path, other: str) -> dict[str, Any]:
    """The state in ``path``, whose files have other names than modules, as of experts that lie in one tensor. CheckpointError,
    with ``other``, a name that did not fit, if transformers finds no more in it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    problem = f"{path}: the weights do not fit this model, see {other}"
    try:
        found, report = type(model).from_pretrained(
            path, config=model.config, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as cause:
        raise CheckpointError(problem) from cause
    if report["missing_keys"] or report["unexpected_keys"]:
        raise CheckpointError(problem)
    state: dict[str, Any] = found.state_dict()
    return state


def _matches(name: str, prefixes: list[str], pattern: str | None) -> bool:
    return any(name.startswith(prefix) for prefix in prefixes) or (pattern is not None and re.search(pattern, name) is not None)


def _frozen_by_ratio(model: Any, ratio: float) -> set[str]:
    """Names of the first parameters, in the model's order, that together hold at most ``ratio`` of all numbers."""
    budget = ratio * sum(parameter.numel() for parameter in model.parameters())
    frozen: set[str] = set()
    for name, parameter in model.named_parameters():
        budget -= parameter.numel()
        if budget < 0:
            break
        frozen.add(name)
    return frozen
