"""A step of a pipeline: micro-batches through the stages of all its processes, forward and backward.

``torch.distributed.pipelining`` is not used. Its stages take one shape for all micro-batches of a run of the schedule, get
buffers for all of them at once, and find the shapes by a forward and a backward pass through the whole pipeline, again for
every shape; its schedules have a fixed number of micro-batches. Here a step has as many as it has, each of its own width
and with its own layout, and since every process of a pipeline gets the same batches, it knows the shape of what it receives.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from swift import console
from swift.errors import ConfigError
from swift.model.batch import Batch
from swift.model.layout import Layout
from swift.objectives.base import Objective
from swift.parallel.base import Sums
from swift.parallel.pipeline.exchange import add_shared_gradients, gather_state
from swift.parallel.pipeline.schedule import SCHEDULES, Action, Table, forward_only, idle_share, in_time, receiver
from swift.parallel.pipeline.stages import Stages

# B rows, T tokens of a row, D model width

LossSum = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


class _Alive(NamedTuple):
    """What a forward pass leaves for its backward pass."""

    received: Tensor | None
    end: GradientEdge | Tensor | None  # of what was sent, or the loss; None if nothing here is trained
    dtype: torch.dtype  # of what was computed


@dataclass
class _Step:
    """One step while it goes on."""

    strategy: Any
    policy: Any
    loss_sum: LossSum
    batches: Sequence[Batch]
    parts: Sequence[Batch]  # what of each batch is computed here; processes of a sequence have some of its tokens
    count: float
    backward: Callable[[Tensor], None] | None
    sums: Sums
    alive: dict[tuple[int, int], _Alive]
    inbox: dict[Action, tuple[Tensor, Any]]
    outbox: list[tuple[Any, Tensor]]

    @property
    def is_trained(self) -> bool:
        return self.backward is not None


class Pipeline:
    """The processes of ``group``, each with some of a model's blocks (``stages``)."""

    def __init__(self, stages: Stages, group: Any, device: torch.device, *, schedule: str = "1f1b") -> None:
        self.stages, self.group, self.device, self.schedule = stages, group, device, schedule
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self.virtual = stages.count // self.processes
        self.peak_alive = 0  # micro-batches whose activations were kept at once, at most
        self._tables: dict[tuple[str, int], Table] = {}
        self._has_warned = False
        # NCCL connects a group in its first call, to which all of it must come, and transfers are between two of it alone.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    @property
    def is_last(self) -> bool:
        """Whether this process has the head, and so the loss."""
        return self.rank == self.processes - 1

    def accumulate(
        self,
        strategy: Any,
        policy: Any,
        objective: Objective,
        batches: Sequence[Batch],
        count: float,
        *,
        backward: Callable[[Tensor], None] = torch.autograd.backward,
    ) -> Sums:
        """Forward and backward over the batches of a step, which are the same in every process of the pipeline.

        Gradients are those of the loss divided by ``count``. The sums are the same in every process. ``backward`` starts the
        backward pass of a loss; it may scale it. Forward passes go through ``strategy.call`` within ``strategy.autocast()``.
        An objective that compares finds in the batches what ``with_reference`` has put there.
        """
        self._warn_of_idle(len(batches))
        loss_sum = functools.partial(objective.loss_sum, policy, None)
        batches = self._ready(batches)
        return self._shared_sums(self._go(strategy, policy, loss_sum, batches, self.schedule, count=count, backward=backward))

    @torch.no_grad()
    def evaluate(self, strategy: Any, policy: Any, objective: Objective, batches: Sequence[Batch]) -> Sums:
        """Loss and metrics of ``batches``, forward only; the same in every process of the pipeline."""
        loss_sum = functools.partial(objective.loss_sum, policy, None)
        return self._shared_sums(self._go(strategy, policy, loss_sum, self._ready(batches), "forward"))

    @torch.no_grad()
    def with_reference(self, strategy: Any, reference: Any, batches: Sequence[Batch]) -> list[Batch]:
        """``batches`` with the log-probabilities that ``reference`` gives to their documents, where the loss is taken.

        The model of ``reference`` has its blocks in these stages: it is the one that is trained, with another adapter or none,
        or another one. All batches go through them once, forward only, and nothing of that is kept but the results.
        """
        batches = self._ready(batches)
        if all(batch.reference_logps is not None for batch in batches):  # computed before training
            return batches
        found: dict[int, Tensor] = {}

        def keep(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            logps = found[id(batch)] = reference.logps(batch)
            return logps.sum(), {}

        self._go(strategy, reference, keep, batches, "forward")
        return [replace(batch, reference_logps=found[id(batch)]) for batch in batches] if self.is_last else batches

    def add_shared_gradients(self) -> None:
        """Add up the gradients of weights that two stages have (tied embeddings); after those of other axes are complete."""
        add_shared_gradients(self.stages, self.group)

    def is_counted(self, name: str) -> bool:
        """Whether the gradient of the parameter ``name`` counts in this process's part of the norm."""
        return all(shared.name != name or shared.is_counted for shared in self.stages.shared)

    def whole(self, own: dict[str, Tensor], *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """The tensors of all stages in the first process of the pipeline, by the names that they have in the whole model; {} elsewhere."""
        found = gather_state(own, self.group, self.device)
        if self.rank == 0:
            for alias, name in self.stages.aliases.items():
                if name in found and (only is None or only(alias)):
                    found[alias] = found[name]
        return found

    def _ready(self, batches: Sequence[Batch]) -> list[Batch]:
        return [without_root(batch.to(self.device)) for batch in batches]

    def _table(self, schedule: str, batches: int) -> Table:
        if (schedule, batches) not in self._tables:
            orders = (forward_only if schedule == "forward" else SCHEDULES[schedule])(self.processes, self.virtual, batches)
            self._tables[schedule, batches] = in_time(orders, self.stages.count)
        return self._tables[schedule, batches]

    def _warn_of_idle(self, batches: int) -> None:
        if batches < self.processes and not self._has_warned:
            self._has_warned = True
            warn_of_idle(self.processes, self.virtual, batches)

    def _go(
        self,
        strategy: Any,
        policy: Any,
        loss_sum: LossSum,
        batches: Sequence[Batch],
        schedule: str,
        *,
        count: float = 1.0,
        backward: Callable[[Tensor], None] | None = None,
    ) -> Sums:
        """The sums of the process with the loss; no gradients without ``backward``."""
        if getattr(policy, "router_aux_loss_coef", 0.0):
            raise ConfigError(
                "--router_aux_loss_coef is computed over all blocks, and no process of a pipeline has all", hint="--router_aux_loss_coef 0"
            )
        table = self._table(schedule, len(batches))
        parts = [policy.own(batch) for batch in batches]
        step = _Step(strategy, policy, loss_sum, batches, parts, count, backward, Sums(), {}, {}, [])
        for tick in zip(*table, strict=True):
            action = tick[self.rank]
            computed = self._compute(step, action) if action is not None else None
            self._transfer(step, tick, computed)
        for work, _ in step.outbox:
            work.wait()
        return step.sums

    def _compute(self, step: _Step, action: Action) -> Tensor | None:
        """What the stage after, or before, is to get."""
        received = None
        if action in step.inbox:
            received, work = step.inbox.pop(action)
            work.wait()
        return self._forward(step, action, received) if action.is_forward else self._backward(step, action, received)

    def _forward(self, step: _Step, action: Action, received: Tensor | None) -> Tensor | None:
        if received is not None and step.is_trained:
            received.requires_grad_()
        output: Tensor | None = None
        end: GradientEdge | Tensor | None = None
        with self.stages.running(action.stage, received) as after, step.strategy.autocast():
            if after is None:
                loss, metrics = step.strategy.call(step.loss_sum, step.batches[action.batch])
                step.sums.add(loss, metrics)
                end = loss / max(step.count, 1.0)
            else:
                output = step.strategy.call(_hidden, step.policy, step.parts[action.batch], after)
                end = get_gradient_edge(output) if output.requires_grad else None  # not the numbers, which are sent and then gone
        if step.is_trained:
            dtype = torch.float32 if output is None else output.dtype
            step.alive[action.stage, action.batch] = _Alive(received, end, dtype)
            self.peak_alive = max(self.peak_alive, len(step.alive))
        if output is None:
            return None
        # Sharded weights may travel in fewer bits than those of which the stages have agreed.
        return output.detach().to(self.stages.received_dtype(action.stage + 1)).contiguous()

    def _backward(self, step: _Step, action: Action, gradient: Tensor | None) -> Tensor | None:
        received, end, dtype = step.alive.pop((action.stage, action.batch))
        if isinstance(end, Tensor):
            assert step.backward is not None
            if end.requires_grad:
                step.backward(end)
        elif end is not None:
            assert gradient is not None
            torch.autograd.backward([end], [gradient.to(dtype)])
        if received is None:
            return None
        return torch.zeros_like(received) if received.grad is None else received.grad

    def _transfer(self, step: _Step, tick: Sequence[Action | None], computed: Tensor | None) -> None:
        """Post what was computed in this tick by anyone and is needed elsewhere; all processes see the same ticks in the same order."""
        posts: list[tuple[dist.P2POp, Action | None]] = []
        for rank, action in enumerate(tick):
            to = None if action is None else receiver(action, self.stages.count)
            if action is None or to is None:
                continue
            peer = to % self.processes
            if rank == self.rank:
                assert computed is not None
                posts.append((dist.P2POp(dist.isend, computed, group=self.group, group_peer=peer), None))
            elif peer == self.rank:
                at = to if action.is_forward else action.stage  # the stage after the boundary that is crossed
                shape = (*step.parts[action.batch].input_ids.shape, self.stages.structure.width)
                buffer = torch.empty(shape, dtype=self.stages.received_dtype(at), device=self.device)
                posts.append((dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=rank), action._replace(stage=to)))
        if not posts:
            return
        works = dist.batch_isend_irecv([post for post, _ in posts])
        if len(works) < len(posts):  # NCCL has one for all
            works = [works[0]] * len(posts)
        for (post, expected), work in zip(posts, works, strict=True):
            if expected is None:
                step.outbox.append((work, post.tensor))
            else:
                step.inbox[expected] = (post.tensor, work)
        step.outbox = [(work, tensor) for work, tensor in step.outbox if not work.is_completed()]

    def _shared_sums(self, sums: Sums) -> Sums:
        """What the process with the loss has, in all of them."""
        box: list[Any] = [(float(sums.loss), {name: float(value) for name, value in sums.metrics.items()}) if self.is_last else None]
        dist.broadcast_object_list(box, group=self.group, group_src=self.processes - 1)
        found = Sums()
        found.loss, found.metrics = box[0]
        return found


def _hidden(policy: Any, part: Batch, after: Any) -> Tensor:
    policy.decode(part)
    hidden: Tensor = after.take()
    return hidden


def warn_of_idle(processes: int, virtual: int, batches: int) -> None:
    """Say that a step of ``batches`` forward passes leaves most of a pipeline waiting, and what fills it."""
    console.warn(
        f"a step has {batches} forward passes for a pipeline of {processes} processes, which wait "
        f"{idle_share(processes, virtual, batches):.0%} of the time; "
        "raise --gradient_accumulation_steps, or lower --per_device_train_batch_size or --max_tokens_per_batch"
    )


def without_root(batch: Batch) -> Batch:
    """``batch`` with the tokens that the whole step begins with in its own row, where its documents continue them."""
    if batch.root_ids is None:
        return batch
    assert batch.layout is not None and batch.position_ids is not None
    root = len(batch.root_ids)
    layout = Layout((root, *batch.layout.lengths), (-1, *(parent + 1 for parent in batch.layout.parents)))
    return replace(
        batch,
        input_ids=torch.cat([batch.root_ids[None], batch.input_ids], dim=1),
        position_ids=torch.cat([torch.arange(root, device=batch.position_ids.device)[None], batch.position_ids], dim=1),
        layout=layout,
        root_ids=None,
        kept_K=batch.kept_K + root,
    )
