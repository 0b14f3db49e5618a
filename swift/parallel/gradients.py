"""Gradients of parameters of which each process holds all, or a part: their common norm, and how they are scaled down."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(gradients: Iterable[Tensor], device: torch.device, groups: Sequence[Any] = ()) -> float:
    """The Euclidean norm of all ``gradients`` together, the same in every process; inf or nan if one of them is.

    Parts of one tensor are added up over the axes on which it is sharded. ``groups`` hold different parameters altogether,
    as stages of a pipeline do.
    """
    squares: dict[tuple[Any, ...], Tensor] = {}
    names: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for gradient in gradients:
        axes: tuple[Any, ...] = ()
        if isinstance(gradient, DTensor):
            if any(placement.is_partial() for placement in gradient.placements):
                gradient = gradient.redistribute(
                    placements=[Replicate() if placement.is_partial() else placement for placement in gradient.placements]
                )
            mesh, cut = gradient.device_mesh, [axis for axis, placement in enumerate(gradient.placements) if is_sharded(placement)]
            axes = tuple(mesh.get_group(axis) for axis in cut)
            names[axes] = tuple((mesh.mesh_dim_names or ())[axis] for axis in cut)
        own = local(gradient)
        square = torch.linalg.vector_norm(own, dtype=torch.float32).double() ** 2 if own.numel() else torch.zeros((), dtype=torch.float64)
        squares[axes] = squares[axes] + square.to(device) if axes in squares else square.to(device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    # The same order in all processes, lest two wait for each other: names of groups, unlike those of axes, are not the same.
    for axes in sorted(squares, key=lambda axes: names.get(axes, ())):
        for group in axes:
            dist.all_reduce(squares[axes], group=group)
        total += squares[axes]
    for group in groups:
        dist.all_reduce(total, group=group)
    return math.sqrt(float(total)) if math.isfinite(float(total)) else float(total)


def is_sharded(placement: Any) -> bool:
    """Whether an axis of the mesh has parts, of rows side by side or not."""
    return isinstance(placement, Shard) or placement.is_shard() or type(placement).__name__ == "_StridedShard"


def scale(gradients: Iterable[Tensor], factor: float) -> None:
    """Multiply all ``gradients`` in place."""
    if factor != 1.0:
        owns = [local(gradient) for gradient in gradients]
        if owns:
            torch._foreach_mul_(owns, factor)
