"""What the processes of a pipeline tell one another besides hidden states: gradients of shared weights, and all their weights."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from swift.parallel.pipeline.stages import Stages


def add_shared_gradients(stages: Stages, group: Any) -> None:
    """Sum, in both processes, the gradients of each parameter that two of them have. Parts of parameters are added as parts."""
    for shared in stages.shared:
        parameter = stages.model.get_parameter(shared.name)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        own = own if own.is_contiguous() else own.contiguous()
        other = torch.empty_like(own)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, own, group=group, group_peer=shared.peer),
                dist.P2POp(dist.irecv, other, group=group, group_peer=shared.peer),
            ]
        )
        for work in works:
            work.wait()
        target = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        target.add_(other)


def gather_state(own: dict[str, Tensor], group: Any, device: torch.device) -> dict[str, Tensor]:
    """``own`` of all processes of ``group`` as one, on the CPU of its first process; {} in the others. One tensor travels at a time."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    headers: list[Any] = [None] * size
    dist.all_gather_object(headers, [(name, tensor.shape, tensor.dtype) for name, tensor in own.items()], group=group)
    if rank:
        for tensor in own.values():
            dist.send(tensor.detach().to(device).contiguous(), group=group, group_dst=0)
        return {}
    found = {name: tensor.cpu() for name, tensor in own.items()}
    for other in range(1, size):
        for name, shape, dtype in headers[other]:
            buffer = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(buffer, group=group, group_src=other)
            found[name] = buffer.cpu()
    return found
