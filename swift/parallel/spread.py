"""The strategy for several processes: copies of the model (DDP), or parts of it (FSDP2), whole or in stages, on one mesh."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from swift.errors import ConfigError, TrainingError
from swift.model.batch import Batch
from swift.objectives.base import Objective
from swift.parallel import state, tensor
from swift.parallel.base import Sums, accumulate, evaluate
from swift.parallel.experts import expert_layers, expert_meshes, expert_parameters, use_expert_parallel
from swift.parallel.gradients import local, scale, total_norm
from swift.parallel.mesh import Mesh
from swift.parallel.pipeline.run import Pipeline
from swift.parallel.replicate import Replicas
from swift.parallel.scaling import LossScale
from swift.parallel.sequence import Share, in_parts, make_share, use_sequence_parallel
from swift.parallel.shard import shard
from swift.parallel.single import Single
from swift.parallel.tensor import split_layers
from swift.parallel.world import World, add
from swift.tuner.blocks import blocks_of


class Spread:
    """Processes that see different rows. Each holds all of the model, or with ``shards`` a part of every parameter."""

    def __init__(
        self,
        world: World,
        mesh: Mesh,
        device: torch.device,
        *,
        shards: bool,
        autocast_dtype: torch.dtype | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        split: Callable[[Any], Pipeline] | None = None,
        sequence_kind: str | None = None,
        experts: int = 1,
    ) -> None:
        """``split`` leaves in a model the stages of a pipeline that this process has.

        ``sequence_kind`` says how processes of the axis cp share a sequence; ``experts`` processes of the data axis share
        the experts of each layer.
        """
        self.world, self.mesh, self.device, self.autocast_dtype = world, mesh, device, autocast_dtype
        self.cuts_parameters = shards
        self.shards = shards or split is not None or mesh.size("tp") > 1 or experts > 1  # no process holds all weights
        self.sequence_kind, self.experts = sequence_kind, experts
        self.share: Share | None = None
        self.cpu_offload, self.reshard_after_forward = cpu_offload, reshard_after_forward
        self.scale = LossScale() if autocast_dtype == torch.float16 else None
        self.split = split
        self.pipeline: Pipeline | None = None
        self._second: Pipeline | None = None  # of another model, which is not trained
        self._entry: Any = None
        self._writers: Any = None  # processes as they write in the background

    def prepare(self, model: Any, make_optimizer: Callable[[Any], Optimizer]) -> tuple[Any, Optimizer]:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.mesh.size("tp") > 1:
            split_layers(model, self.mesh["tp"])
        if self.mesh.size("cp") > 1:
            self.share = make_share(inner.config, self.mesh.group("cp"), self.sequence_kind, tp=self.mesh.size("tp"))
            use_sequence_parallel(inner, self.share)
        own_data = self.mesh.data
        if self.experts > 1:
            own_data, same_layer = expert_meshes(self.mesh.data, self.experts)
            use_expert_parallel(model, same_layer)
        if self.split is not None:
            self.pipeline = self.split(model)
        if self.cuts_parameters:
            try:
                blocks = list(blocks_of(inner)) if self.pipeline is None else self.pipeline.stages.local_blocks
            except ConfigError as problem:
                raise ConfigError(f"--fsdp cannot be used with this model: {problem.message}", hint="leave --fsdp away") from None
            self._entry = shard(
                model,
                blocks,
                self.mesh.data,
                experts=expert_layers(model),
                expert_mesh=own_data,
                param_dtype=self._param_dtype(model),
                cpu_offload=self.cpu_offload,
                reshard_after_forward=self.reshard_after_forward,
            )
        if self.shards and not self.cpu_offload:  # it was split in main memory, which may hold what no device does
            model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        self.model = model
        self.optimizer = make_optimizer(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        counts = self.pipeline.is_counted if self.pipeline is not None else lambda _: True
        self.counted = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and counts(name)]
        cut = expert_parameters(model) if self.experts > 1 else set()
        copies = {name: each for name, each in model.named_parameters() if each.requires_grad and not self.cuts_parameters}
        self.replicas = [
            Replicas([each for name, each in copies.items() if name not in cut], self.mesh.data.get_group()),
            *([Replicas([copies[name] for name in copies if name in cut], own_data.get_group())] if cut else []),
        ]
        return model, self.optimizer

    def _param_dtype(self, model: Any) -> torch.dtype | None:
        """The precision in which weights travel: that of the computation, if they are trained in float32."""
        trained = {parameter.dtype for parameter in model.parameters()}
        return self.autocast_dtype if trained == {torch.float32} else None

    def autocast(self) -> Any:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments) if self._entry is None else self._entry(function, *arguments)

    def _let_go(self) -> None:
        """Parameters are parts again, those too that a pass without a backward pass has left whole."""
        for unit in self._entry.modules() if self._entry is not None else ():
            if isinstance(unit, FSDPModule):
                unit.reshard()

    def add(self, values: Sequence[float]) -> list[float]:
        return add(values, self.device, self.mesh.group("dp"))

    def accumulate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch], count: float) -> Sums:
        if self.pipeline is not None:
            batches = self._with_reference(reference, policy, batches)
            return self.pipeline.accumulate(self, in_parts(policy, self.share), objective, batches, count, backward=self._scaled_backward)
        self._left = len(batches) + (batches[0].root_ids is not None)
        reference = in_parts(reference, self.share, policy)
        policy = in_parts(policy, self.share)
        return accumulate(self, policy, objective, reference, batches, count, self.device)

    def evaluate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch]) -> Sums:
        if self.pipeline is not None:
            batches = self._with_reference(reference, policy, batches)
            return self.pipeline.evaluate(self, in_parts(policy, self.share), objective, batches)
        return evaluate(self, in_parts(policy, self.share), objective, in_parts(reference, self.share, policy), batches, self.device)

    def place_second(self, model: Any) -> Any:
        """The frozen ``model`` on the device: whole, or what this process has of its stages."""
        if self.split is None:
            return model.to(self.device)
        try:
            self._second = self.split(model)
        except ConfigError as problem:
            raise ConfigError(
                f"the reference: {problem.message}", hint="--precompute_ref_log_probs true computes it whole, before"
            ) from None
        return model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))

    def _with_reference(self, reference: Any, policy: Any, batches: Sequence[Batch]) -> Sequence[Batch]:
        """``batches`` with what ``reference`` says of them: stages compute one model at a time."""
        if reference is None:
            return batches
        if self._second is None:
            assert self.pipeline is not None
            return self.pipeline.with_reference(self, in_parts(reference, self.share, policy), batches)
        return self._second.with_reference(Single(self.device, autocast_dtype=self.autocast_dtype), reference, batches)

    def backward(self, loss: Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            for replicas in self.replicas:
                replicas.expect()
        self._scaled_backward(loss)

    def _scaled_backward(self, loss: Tensor) -> None:
        (loss if self.scale is None else loss * self.scale.value).backward()

    def clip_and_step(self, max_grad_norm: float) -> tuple[float, bool]:
        for replicas in self.replicas:
            replicas.finish()
        if self.pipeline is not None:
            self.pipeline.add_shared_gradients()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        counted = [parameter.grad for parameter in self.counted if parameter.grad is not None]
        factor = 1.0 if self.scale is None else 1.0 / self.scale.value
        norm = total_norm(counted, self.device, [self.pipeline.group] if self.pipeline is not None else []) * factor
        is_finite = math.isfinite(norm)
        if is_finite:
            clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm > 0 else 1.0  # as torch clips
            scale(gradients, factor * clip)
            self.optimizer.step()
        elif self.scale is None:
            raise TrainingError(f"the gradient norm is {norm}")
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale is not None:
            self.scale.update(is_finite)
        return norm, is_finite

    def whole(self, model: Any, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        self._let_go()
        if self.pipeline is None:
            return tensor.whole(model, only=only)
        is_first = all(self.mesh.rank(axis) == 0 for axis in ("dp", "cp", "tp"))  # the main process, or the first of its stage
        found = tensor.whole(model, only=only, is_wanted=is_first)
        return self.pipeline.whole(found, only=only) if is_first else found

    def local_bytes(self) -> dict[str, int]:
        """Bytes of weights and of optimizer state that this process holds."""
        states = [value for each in self.optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
        return {
            "weights": sum(local(parameter).numel() * parameter.element_size() for parameter in self.model.parameters()),
            "optimizer": sum(local(value).numel() * value.element_size() for value in states),
        }

    def save(self, path: Path, *, in_background: bool = False) -> Any:
        if in_background and self._writers is None:
            self._writers = dist.new_group(backend="gloo")
        return state.save(
            path,
            self._names(),
            self.optimizer,
            self.world,
            is_sharded=self.shards,
            scale=self.scale,
            in_background=self._writers if in_background else None,
        )

    def _names(self) -> dict[Any, str]:
        self._let_go()
        return state.names_of(self.model, self.pipeline.stages.aliases if self.pipeline is not None else None)

    def load(self, path: Path) -> None:
        state.load(path, self._names(), self.optimizer, self.world, scale=self.scale)
