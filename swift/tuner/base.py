"""The contract of a tuner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch.optim import Optimizer

from swift.config.tuner import TunerConfig


class Tuner(Protocol):
    """What a training run asks of a tuner."""

    def apply(self, model: Any, config: TunerConfig, *, total_steps: int | None = None) -> Any:
        """The model to train: other weights frozen, trained ones in a precision that can be trained.

        ``total_steps`` is the length of the run; a tuner that must know it raises ConfigError without.
        """

    def save(self, model: Any, path: Path, *, max_shard_size: str) -> None:
        """Write what was trained into the folder ``path``, in the format that peft or transformers load."""

    def kept(self, model: Any) -> set[str] | None:
        """The names in ``model.state_dict()`` that ``save`` reads; None for all."""

    def load(self, model: Any, path: Path) -> None:
        """Put saved weights into ``model``, which ``apply`` made; the same bits as were saved."""

    def attach(self, model: Any, optimizer: Optimizer, step: Callable[[], int]) -> None:
        """Hang what the tuner does between steps on ``model`` and ``optimizer``; ``step`` tells the steps that are done."""


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trainable and all parameters. A 4-bit weight packs two numbers into a byte and counts as its numbers."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
