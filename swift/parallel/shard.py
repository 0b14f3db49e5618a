"""FSDP2: weights, gradients and optimizer state in parts, one of each parameter in each process."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from swift.parallel.gradients import local


class Entry(nn.Module):
    """The root of a sharded model: what is called through it finds the weights outside of the blocks in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    experts: Sequence[nn.Module] = (),
    expert_mesh: DeviceMesh | None = None,
    param_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> Entry:
    """``model`` in parts over the processes of ``mesh`` (1-D): one unit for each of ``blocks``, one for the rest.

    ``experts``, which other processes have others of, are units of their own over the processes that have the same ones,
    ``expert_mesh`` (1-D): parts of what their own axis has left here.
    Weights are gathered in ``param_dtype`` (None: their own), gradients are added up in float32, never averaged. With
    ``cpu_offload`` the parts and the optimizer live in main memory. Forward passes go through the Entry that is returned.
    """
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for layer in experts:
        inside = {**options, "mesh": expert_mesh, "shard_placement_fn": functools.partial(_evenly, expert_mesh.size())}  # type: ignore[union-attr]
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **inside)
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    entry = Entry(model)
    fully_shard(entry, reshard_after_forward=False, **options)
    for unit in (*experts, *blocks, entry):
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    return entry


def _evenly(size: int, parameter: nn.Parameter) -> Shard | None:
    """The first dimension, unless ``size`` divides only the second one: of few experts some processes would have none, and all pay."""
    own = local(parameter).shape
    return Shard(1) if own[0] % size and own[1] % size == 0 else None
