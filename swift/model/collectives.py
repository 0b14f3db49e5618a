"""Collective operations with a gradient, for processes that share a layer: each pairs what is done forward with what is done backward.

Shoeybi et al. 2019 (arXiv:1909.08053) call the first two f and g. All processes of a group must come to each of them, in
the same order.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = Any  # dist.ProcessGroup, which mypy sees as another type in builds without distributed


def sum_gradient(x: Tensor, group: Group) -> Tensor:
    """``x`` itself; its gradient is the sum of the group's, each of which knows its own part of the layer alone."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    out: Tensor = _SumGradient.apply(x, group)
    return out


def sum_parts(x: Tensor, group: Group) -> Tensor:
    """The sum of the group's ``x``; its gradient, the same in each process, is that of each part."""
    out: Tensor = _SumParts.apply(x, group)
    return out


def gather_last(x: Tensor, group: Group, size: int) -> Tensor:
    """(.., size) the group's ``x`` one after the other along the last dimension, as ``torch.chunk`` would have cut them."""
    out: Tensor = _GatherLast.apply(x, group, size)
    return out


def split_last(x: Tensor, group: Group) -> Tensor:
    """This process's chunk of the last dimension of ``x``, which all have; the gradient is gathered."""
    out: Tensor = _SplitLast.apply(x, group)
    return out


def chunk_size(size: int, parts: int) -> int:
    """Length of all chunks but the last ones, as ``torch.chunk`` and DTensor have it."""
    return -(-size // parts)


def _own_chunk(x: Tensor, group: Group) -> Tensor:
    length = chunk_size(x.shape[-1], dist.get_world_size(group))
    first = min(dist.get_rank(group) * length, x.shape[-1])
    return x.narrow(-1, first, min(length, x.shape[-1] - first))


def _gathered(x: Tensor, group: Group, size: int) -> Tensor:
    parts = dist.get_world_size(group)
    length = chunk_size(size, parts)
    own = torch.nn.functional.pad(x, (0, length - x.shape[-1])).contiguous()
    whole = own.new_empty(parts, *own.shape)
    dist.all_gather_single(whole.view(-1, *own.shape[1:]), own, group=group)
    return whole.movedim(0, -2).reshape(*own.shape[:-1], parts * length)[..., :size]


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)  # another branch of the graph may hold this very tensor
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, size: int) -> Tensor:
        ctx.group = group
        return _gathered(x, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own_chunk(grad, ctx.group), None, None


class _SplitLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.size = group, x.shape[-1]
        return _own_chunk(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group, ctx.size), None
