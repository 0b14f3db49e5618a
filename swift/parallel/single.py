"""One device: automatic mixed precision, a dynamic loss scale for float16, clipping, the optimizer step."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from swift.errors import TrainingError
from swift.model.batch import Batch
from swift.objectives.base import Objective
from swift.parallel import state
from swift.parallel.base import Sums, accumulate, evaluate
from swift.parallel.scaling import SMALLEST_SCALE
from swift.parallel.world import World


class Single:
    """The strategy for one process on one device."""

    shards = False

    def __init__(self, device: torch.device, *, autocast_dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.autocast_dtype = autocast_dtype
        # Doubles after 2000 good steps, halves and skips the step when a gradient overflows.
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype == torch.float16)

    def prepare(self, model: Any, make_optimizer: Callable[[Any], Optimizer]) -> tuple[Any, Optimizer]:
        self.model = model
        self.optimizer = make_optimizer(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, self.optimizer

    def autocast(self) -> Any:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def add(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def accumulate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch], count: float) -> Sums:
        return accumulate(self, policy, objective, reference, batches, count, self.device)

    def evaluate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch]) -> Sums:
        return evaluate(self, policy, objective, reference, batches, self.device)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip_and_step(self, max_grad_norm: float) -> tuple[float, bool]:
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm if max_grad_norm > 0 else math.inf))
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
        elif not self.scaler.is_enabled():
            raise TrainingError(f"the gradient norm is {norm}")
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise TrainingError("the gradients overflow float16 at every loss scale")
        return norm, math.isfinite(norm)

    def whole(self, model: Any, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in model.state_dict().items() if only is None or only(name)}

    def save(self, path: Path, *, in_background: bool = False) -> Any:
        return state.save(path, state.names_of(self.model), self.optimizer, World(), is_sharded=False, scale=self.scaler)

    def load(self, path: Path) -> None:
        state.load(path, state.names_of(self.model), self.optimizer, World(), scale=self.scaler if self.scaler.is_enabled() else None)
