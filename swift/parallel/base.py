"""The contract of a strategy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class Strategy(Protocol):
    """How gradients are computed and applied. The loop knows nothing else of precision or devices."""

    def prepare(self, model: Any, make_optimizer: Callable[[Any], Optimizer]) -> tuple[Any, Optimizer]:
        """The model and optimizer that the loop works with."""

    def autocast(self) -> Any:
        """A context in which forward passes run."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""

    def clip_and_step(self, max_grad_norm: float) -> tuple[float, bool]:
        """Clip, update, clear. Returns the gradient norm before clipping, and whether weights were updated."""

    def save(self, path: Path) -> None:
        """Write optimizer and scaler state."""

    def load(self, path: Path) -> None:
        """Read it back: training goes on bit for bit."""
