"""AdaLoRA, through PEFT: LoRA whose ranks are distributed over the layers while it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from swift.config.tuner import TunerConfig
from swift.errors import ConfigError
from swift.tuner.adapter import TUNER_STATE, read_tensors, save_adapter
from swift.tuner.peft_tuners import PeftTuner

IMPORTANCE = ("exp_avg_ipt", "exp_avg_unc")


class AdaLoraTuner(PeftTuner):
    """Adaptive budget allocation (Zhang et al. 2023, arXiv:2303.10512).

    Each update is B E A with a diagonal E, whose least important entries are set to zero. After each step PEFT needs the
    gradients, so the work hangs on the optimizer: the gradient of the orthogonality penalty is added before it steps
    (after clipping), and ranks are distributed after it.
    """

    def more_fields(self, config: TunerConfig, total_steps: int | None) -> dict[str, Any]:
        if total_steps is None:
            raise ConfigError("adalora has to know the number of steps: it is for swift sft and pt", hint="use --tuner_type lora")
        first, last = config.adalora_tinit, config.adalora_tfinal
        if total_steps <= first + last:
            raise ConfigError(
                f"{total_steps} steps leave none between --adalora_tinit {first} and --adalora_tfinal {last}",
                hint="lower them, or train longer",
            )
        return {"total_step": total_steps}

    def attach(self, model: Any, optimizer: Optimizer, step: Callable[[], int]) -> None:
        settings = model.peft_config["default"]
        A = [parameter for name, parameter in model.named_parameters() if ".lora_A." in name]
        B = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]

        def before(*_: Any) -> None:
            if settings.orth_reg_weight:
                (settings.orth_reg_weight * distance_from_orthonormal_rows([*A, *(factor.T for factor in B)])).backward()

        def after(*_: Any) -> None:
            model.base_model.update_and_allocate(step() + 1)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def save(self, model: Any, path: Path, *, max_shard_size: str) -> None:
        """All ranks are kept in the file, those that are taken away as zeros: PEFT would lose what may come back."""
        from safetensors.torch import save_file

        settings, ranks = model.peft_config["default"], model.base_model.rankallocator
        pattern, settings.rank_pattern = settings.rank_pattern, None
        try:
            save_adapter(model, path)
        finally:
            settings.rank_pattern = pattern
        state = {f"{kind}:{name}": tensor for kind in IMPORTANCE for name, tensor in getattr(ranks, kind).items()}
        state |= {f"rank_pattern:{name}": torch.tensor(kept) for name, kept in (pattern or {}).items()}
        save_file(state, path / TUNER_STATE)

    def load(self, model: Any, path: Path) -> None:
        settings, ranks = model.peft_config["default"], model.base_model.rankallocator
        settings.rank_pattern = None
        super().load(model, path)
        if not (path / TUNER_STATE).is_file():
            return
        device = next(model.parameters()).device
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*IMPORTANCE, "rank_pattern")}
        for key, tensor in read_tensors(path / TUNER_STATE).items():
            kind, _, name = key.partition(":")
            kinds[kind][name] = tensor
        for kind in IMPORTANCE:
            setattr(ranks, kind, {name: tensor.to(device) for name, tensor in kinds[kind].items()})
        ranks.ipt = dict(ranks.exp_avg_ipt)  # PEFT asks it which names it knows, and computes its values anew
        settings.rank_pattern = {name: kept.tolist() for name, kept in kinds["rank_pattern"].items()} or None


def distance_from_orthonormal_rows(factors: list[Tensor]) -> Tensor:
    """Mean over ``factors`` of the Frobenius norm of M M^T - I, the penalty as PEFT defines it."""
    return torch.stack([torch.linalg.norm(M @ M.T - torch.eye(len(M), dtype=M.dtype, device=M.device)) for M in factors]).mean()
