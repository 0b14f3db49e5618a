"""What processes of a sequence-parallel group send one another. All traffic of the package goes through here."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# u processes of the exchange, n of a ring


class Transpose(torch.autograd.Function):
    """(u, m) to (u, m): row i goes to process i, and becomes the row of the sender. Its own gradient, as a transpose is.

    A process sends (u - 1) m elements, and as many in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(rows: Tensor, group: Any) -> Tensor:
    rows = rows.contiguous()
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, group=group)
    return received


class Gather(torch.autograd.Function):
    """(t, ...) of each process to (u, t, ...) in all of them; gradients are added up. For small tensors."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class Total(torch.autograd.Function):
    """The sum over the processes, in all of them. All go on to compute the same, so each takes the gradient for its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Passing:
    """``tensor`` on its way to the next process of the ring, and the previous one's on its way here."""

    def __init__(self, tensor: Tensor, group: Any) -> None:
        size, rank = group.size(), group.rank()
        self._sent, self._received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, after, group),
                dist.P2POp(dist.irecv, self._received, before, group),
            ]
        )

    def arrived(self) -> Tensor:
        """What the previous process sent; this one's has left."""
        for work in self._works:
            work.wait()
        return self._received
