"""LoRA, through PEFT: a trained low-rank update B A of frozen linear layers."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.config.tuner import TunerConfig
from swift.errors import ConfigError
from swift.tuner.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    TUNER_STATE,
    is_adapter,
    load_adapter_weights,
    put_adapter_weights,
    read_tensors,
    save_adapter,
    with_adapter,
)
from swift.tuner.loftq import start_from_lost_bits
from swift.tuner.peft_tuners import PeftTuner

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILE", "LoraTuner", "is_adapter", "load_adapter_weights", "with_adapter"]


class LoraTuner(PeftTuner):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), with rsLoRA, LoRA+, DoRA, and PiSSA, OLoRA and LoftQ as its start.

    PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Buyukakyuz 2024, arXiv:2406.01775) take the first update B0 A0 out of
    the frozen weights. What is saved is an adapter of the weights as they were: B A - B0 A0, of twice the rank. Training goes on
    from the B and A that are saved beside it.
    """

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}  # B0 and A0, if they were taken out of the weights

    def apply(self, model: Any, config: TunerConfig, *, total_steps: int | None = None) -> Any:
        tuned = super().apply(model, config, total_steps=total_steps)
        if config.init_weights == "loftq":
            start_from_lost_bits(tuned)
        if config.takes_from_base:
            self.start = {name: tensor.detach().clone() for name, tensor in tuned.state_dict().items() if _is_factor(name)}
            if any("lora_embedding" in name for name, _ in tuned.named_parameters()):
                raise ConfigError(
                    f"--init_weights {config.init_weights} is for linear layers", hint="leave embeddings to --modules_to_save"
                )
        return tuned

    def more_fields(self, config: TunerConfig, total_steps: int | None) -> dict[str, Any]:
        start: Any = {"true": True, "false": False, "loftq": True}.get(config.init_weights, config.init_weights)
        return {"init_lora_weights": start}

    def save(self, model: Any, path: Path, *, max_shard_size: str) -> None:
        if not self.start:
            save_adapter(model, path)
            return
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        trained = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
        settings = model.peft_config["default"]
        model.peft_config["default"] = _of_twice_the_rank(settings)
        try:
            state = {name: self._less_start(name, tensor) for name, tensor in model.state_dict().items()}
            save_adapter(model, path, state_dict=state)
        finally:
            model.peft_config["default"] = settings
        save_file(trained, path / TUNER_STATE)

    def load(self, model: Any, path: Path) -> None:
        if self.start and (path / TUNER_STATE).is_file():
            put_adapter_weights(model, read_tensors(path / TUNER_STATE), path)
        else:
            load_adapter_weights(model, path)

    def _less_start(self, name: str, tensor: Tensor) -> Tensor:
        """[B, -B0] or [A; A0], whose product is B A - B0 A0; other tensors as they are."""
        if name not in self.start:
            return tensor
        start = self.start[name].to(tensor)
        return torch.cat((tensor, -start), dim=1) if ".lora_B." in name else torch.cat((tensor, start), dim=0)


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _of_twice_the_rank(settings: Any) -> Any:
    """PEFT's config for the same scale of the update at twice the rank, and a start that changes no weights."""
    doubled = copy.copy(settings)
    doubled.r = 2 * settings.r
    doubled.lora_alpha = settings.lora_alpha * (math.sqrt(2) if settings.use_rslora else 2)
    doubled.init_lora_weights = True
    return doubled
