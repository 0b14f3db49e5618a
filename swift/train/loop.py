"""The training loop. It knows nothing of losses, models or parallelism."""

import itertools
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from swift import progress
from swift.errors import TrainingError
from swift.model.batch import Batch
from swift.objectives.base import Objective, Policy
from swift.parallel.base import Strategy, Sums
from swift.train.state import TrainState

T = TypeVar("T")
AT_ONCE = 32  # forward passes of an evaluation that a strategy is given together; a pipeline is filled and drained once for them


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
    policy: Policy, batches: Sequence[Batch], *, objective: Objective, strategy: Strategy, max_grad_norm: float, reference: Any = None
) -> StepResult:
    """Forward and backward over the micro-batches of one step, then one update.

    The loss is divided once, by the count of the whole step over all processes, so it does not depend on how the step is
    cut. Raises TrainingError, in every process, when the loss is not finite.
    """
    root = len(batches[0].root_ids) if batches[0].root_ids is not None else 0
    own = [sum(objective.count(batch) for batch in batches)]
    own += [sum(batch.num_tokens for batch in batches), root + sum(batch.num_computed for batch in batches)]
    count, tokens, computed = strategy.add(own)
    sums = strategy.accumulate(policy, objective, reference, batches, count)
    names = sorted(sums.metrics)
    loss_sum, *values = strategy.add([float(sums.loss), *(float(sums.metrics[name]) for name in names)])
    if not math.isfinite(loss_sum):
        raise TrainingError(f"the loss is {loss_sum}")
    progress.mark(phase="clip and step")
    grad_norm, was_applied = strategy.clip_and_step(max_grad_norm)
    metrics = dict(zip(names, values, strict=True))
    return StepResult(loss_sum / max(count, 1.0), loss_sum, count, metrics, grad_norm, round(tokens), round(computed), was_applied)


@torch.no_grad()
def evaluate(
    policy: Policy,
    batches: Iterator[Batch],
    *,
    objective: Objective,
    strategy: Strategy,
    reference: Any = None,
) -> dict[str, float]:
    """eval_loss and the objective's metrics over all ``batches`` of all processes: sums divided once."""
    model = policy.model
    was_training = model.training
    model.eval()
    sums, count = Sums(), 0.0
    begin = time.monotonic()
    while parts := list(itertools.islice(batches, AT_ONCE)):
        progress.mark(phase="evaluate")
        sums.include(strategy.evaluate(policy, objective, reference, parts))
        count += sum(objective.count(batch) for batch in parts)
    model.train(was_training)
    names = sorted(sums.metrics)
    count, loss_sum, *values = strategy.add([count, float(sums.loss), *(float(sums.metrics[name]) for name in names)])
    count = max(count, 1.0)
    result = {"eval_loss": loss_sum / count}
    result |= {f"eval_{name}": value / count for name, value in zip(names, values, strict=True)}
    result["eval_runtime"] = time.monotonic() - begin
    return result


def seed_step(seed: int, step: int, stream: int = 0) -> None:
    """Random numbers (dropout, noise) as a function of seed, step and ``stream``, of which processes that see other tokens have another.

    A resumed step draws what it would have drawn.
    """
    torch.manual_seed((seed + 7_368_787 * stream) * 1_000_003 + step)


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
    """Ctrl-C or SIGTERM asks for a stop after the step that is going on; a second of the same kind stops at once.

    Of the other kind it is no second wish: a terminal sends SIGINT to all processes, and a launcher among them (DeepSpeed's),
    a batch system or systemd passes its own SIGTERM on to the others at that moment.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self._seen: set[int] = set()
        self._on_first = on_first
        self._old: dict[int, Any] = {}

    @property
    def is_set(self) -> bool:
        return bool(self._seen)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number in self._seen:
            raise KeyboardInterrupt
        is_first = not self.is_set
        self._seen.add(number)
        if is_first:
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
