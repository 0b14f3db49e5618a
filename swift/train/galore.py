"""GaLore: AdamW whose moments live in a low-rank part of the gradient, so that they take less memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class GaLoreAdamW(Optimizer):
    """Zhao et al. 2024, algorithm 2 (arXiv:2403.03507). Groups with a ``rank`` are projected, others are plain AdamW.

    Settings of a projected group: ``rank``, ``update_proj_gap`` (steps between two projectors), ``scale`` (of the update),
    ``proj_type`` (std and reverse_std project the longer or shorter side, right, left, full both).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        is_projected = "rank" in group
        if is_projected:
            if state.get("step", 0) % group["update_proj_gap"] == 0:
                state["left"], state["right"] = projectors(gradient, group["rank"], group["proj_type"])
            gradient = project(gradient, state["left"], state["right"])
        if "step" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient.to(mean), 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = mean / (1 - beta1 ** state["step"]) / denominator
        if is_projected:
            update = group["scale"] * project_back(update, state["left"], state["right"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def projectors(gradient: Tensor, rank: int, proj_type: str) -> tuple[Tensor | None, Tensor | None]:
    """The first singular vectors of ``gradient`` (M, N): left (M, rank), right (rank, N), or None for a side that stays."""
    rows, columns = gradient.shape
    U, _, Vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    left, right = U[:, :rank].to(gradient).contiguous(), Vh[:rank].to(gradient).contiguous()
    is_right = {"std": rows >= columns, "reverse_std": rows < columns, "right": True, "left": False}
    if proj_type == "full":
        return left, right
    return (None, right) if is_right[proj_type] else (left, None)


def project(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    gradient = gradient if left is None else left.T @ gradient
    return gradient if right is None else gradient @ right.T


def project_back(update: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    update = update if left is None else left @ update
    return update if right is None else update @ right
