"""The contract of a strategy, and how most of them go through the batches of a step."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from swift.model.batch import Batch
from swift.objectives.base import Objective


class Strategy(Protocol):
    """How gradients are computed and applied. The loop knows nothing else of precision, devices or processes."""

    shards: bool
    """Whether a process holds parts of the weights only, so that they must be gathered to be saved or read by other code."""

    def prepare(self, model: Any, make_optimizer: Callable[[Any], Optimizer]) -> tuple[Any, Optimizer]:
        """The model and optimizer that the loop works with."""

    def autocast(self) -> Any:
        """A context in which forward passes run."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` with the model's weights in place. Every forward pass goes through it, in every process."""

    def add(self, values: Sequence[float]) -> list[float]:
        """The sums of ``values`` over the processes that see different tokens; the same in every process."""

    def accumulate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch], count: float) -> "Sums":
        """Forward and backward over this process's batches of a step: the gradients of the loss divided by ``count``."""

    def evaluate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch]) -> "Sums":
        """Loss and metrics of this process's ``batches``, without gradients."""

    def clip_and_step(self, max_grad_norm: float) -> tuple[float, bool]:
        """Add gradients up over the processes, clip, update, clear.

        Returns the gradient norm before clipping, the same in every process, and whether weights were updated.
        """

    def whole(self, model: Any, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """Every tensor of ``model.state_dict()`` whose name ``only`` takes, whole and on the CPU: in the main process, {} elsewhere."""

    def save(self, path: Path, *, in_background: bool = False) -> Any:
        """Write optimizer and scaler state. What is still being written ``in_background`` is a Future, else None."""

    def load(self, path: Path) -> None:
        """Read it back: training goes on bit for bit on as many processes, and as exactly as sums allow on another number."""


class Sums:
    """Loss and metrics of a process's batches, as sums; on the device until they are read."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.metrics: dict[str, Tensor | float] = {}

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        self.loss = self.loss + loss.detach().double() if loss.device.type != "mps" else self.loss + float(loss)
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)

    def include(self, other: "Sums") -> None:
        """Add what ``other`` has."""
        self.loss = self.loss + other.loss
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


@torch.no_grad()
def evaluate(strategy: Any, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch], device: torch.device) -> Sums:
    """One batch after the other, forward only."""
    sums = Sums()
    for batch in batches:
        with strategy.autocast():
            sums.add(*strategy.call(objective.loss_sum, policy, reference, batch.to(device)))
    return sums


def accumulate(
    strategy: Any,
    policy: Any,
    objective: Objective,
    reference: Any,
    batches: Sequence[Batch],
    count: float,
    device: torch.device,
) -> Sums:
    """One batch after the other; tokens that all of them begin with are computed once, before the first."""
    sums = Sums()
    root_ids = batches[0].root_ids
    longest = max((int(batch.layout.document_lengths().max()) for batch in batches if batch.layout is not None), default=None)
    with contextlib.ExitStack() as root:
        with strategy.autocast():
            for model in (policy, reference) if reference is not None else (policy,):
                root.enter_context(model.root(root_ids.to(device) if root_ids is not None else None, longest))
        for batch in batches:
            with strategy.autocast():
                loss, metrics = strategy.call(objective.loss_sum, policy, reference, batch.to(device))
            strategy.backward(loss / max(count, 1.0))
            sums.add(loss, metrics)
    return sums
