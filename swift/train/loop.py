"""The training loop. It knows nothing of losses, models or parallelism."""

import contextlib
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from swift.errors import TrainingError
from swift.model.batch import Batch
from swift.objectives.base import Objective, Policy
from swift.parallel.base import Strategy
from swift.train.state import TrainState

T = TypeVar("T")


@dataclass
class StepResult:
    """What one optimizer step did."""

    loss: float  # of the step, divided by its count
    loss_sum: float
    count: float
    metrics: dict[str, float]  # sums
    grad_norm: float
    tokens: int  # of the rows, as if nothing were padded or shared
    computed: int  # by the forward passes
    was_applied: bool


def train_step(
    policy: Policy, batches: Sequence[Batch], *, objective: Objective, strategy: Strategy, max_grad_norm: float, device: torch.device
) -> StepResult:
    """Forward and backward over the micro-batches of one step, then one update.

    The loss is divided once, by the count of the whole step, so it does not depend on how the step is cut.
    Raises TrainingError when the loss is not finite.
    """
    count = sum(objective.count(batch) for batch in batches)
    loss_sum, metrics = 0.0, dict[str, float]()
    root_ids = batches[0].root_ids
    longest = max((int(batch.layout.document_lengths().max()) for batch in batches if batch.layout is not None), default=None)
    with contextlib.ExitStack() as root:
        with strategy.autocast():
            root.enter_context(policy.root(root_ids.to(device) if root_ids is not None else None, longest))
        for batch in batches:
            with strategy.autocast():
                batch_sum, batch_metrics = objective.loss_sum(policy, None, batch.to(device))
            value = float(batch_sum.detach())
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value}")
            strategy.backward(batch_sum / max(count, 1.0))
            loss_sum += value
            for name, metric in batch_metrics.items():
                metrics[name] = metrics.get(name, 0.0) + float(metric)
    grad_norm, was_applied = strategy.clip_and_step(max_grad_norm)
    tokens, computed = sum(batch.num_tokens for batch in batches), sum(batch.num_computed for batch in batches)
    computed += len(root_ids) if root_ids is not None else 0
    return StepResult(loss_sum / max(count, 1.0), loss_sum, count, metrics, grad_norm, tokens, computed, was_applied)


@torch.no_grad()
def evaluate(
    policy: Policy, batches: Iterator[Batch], *, objective: Objective, strategy: Strategy, device: torch.device
) -> dict[str, float]:
    """eval_loss and the objective's metrics over all ``batches``: sums divided once."""
    model = policy.model
    was_training = model.training
    model.eval()
    loss_sum, count, metrics = 0.0, 0.0, dict[str, float]()
    begin = time.monotonic()
    for batch in batches:
        with strategy.autocast():
            batch_sum, batch_metrics = objective.loss_sum(policy, None, batch.to(device))
        loss_sum += float(batch_sum)
        count += objective.count(batch)
        for name, metric in batch_metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(metric)
    model.train(was_training)
    count = max(count, 1.0)
    result = {"eval_loss": loss_sum / count}
    result |= {f"eval_{name}": value / count for name, value in metrics.items()}
    result["eval_runtime"] = time.monotonic() - begin
    return result


def seed_step(seed: int, step: int) -> None:
    """Random numbers (dropout, noise) as a function of seed and step: a resumed step draws what it would have drawn."""
    torch.manual_seed(seed * 1_000_003 + step)


def ahead(steps: Iterator[T], depth: int) -> Iterator[T]:
    """``steps``, prepared up to ``depth`` ahead by a thread; in line when ``depth`` is 0. Errors reach the reader."""
    if depth == 0:
        yield from steps
        return
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                put(step)
                if stopped.is_set():
                    return
            put(end)
        except BaseException as problem:  # handed to the reader, which raises it
            put(problem)

    threading.Thread(target=work, daemon=True, name="batches").start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


class StopRequest:
    """Ctrl-C or SIGTERM asks for a stop after the step that is going on; a second one stops at once."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.is_set = False
        self._on_first = on_first
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        self._on_first()


def add_to_window(state: TrainState, result: StepResult) -> None:
    """Count a step into what the next logged line will say."""
    state.window_loss += result.loss_sum
    state.window_count += result.count
    state.window_steps += 1
    for name, value in result.metrics.items():
        state.window_metrics[name] = state.window_metrics.get(name, 0.0) + value
    state.tokens += result.tokens
    state.computed_tokens += result.computed
    state.supervised_tokens += int(result.count)


def close_window(state: TrainState) -> dict[str, float]:
    """Loss and metrics since the last logged line, divided by their count; the window starts anew."""
    count = max(state.window_count, 1.0)
    values = {"loss": state.window_loss / count, **{name: value / count for name, value in state.window_metrics.items()}}
    state.window_loss, state.window_count, state.window_steps, state.window_metrics = 0.0, 0.0, 0, {}
    return values
