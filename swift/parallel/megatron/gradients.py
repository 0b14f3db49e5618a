"""Gradients over Megatron's groups of processes: which are summed where, and which count once in the norm."""

from collections.abc import Collection
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

HEAD_NORMS = ("q_layernorm", "k_layernorm")


def sum_gradients(model: nn.Module, groups: Any) -> None:
    """Add up over the processes that see other tokens; over tensor parallel ones where each has a part of the sum.

    The part: norms of heads (each process has other heads), and what works on a part of the sequence. A tied embedding
    has a copy in the last stage, whose gradient belongs to the first's.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # an expert without a token: all processes take part in the sum
                parameter.grad = torch.zeros_like(parameter)
            data = (
                groups.get_expert_data_parallel_group()
                if is_expert(parameter)
                else groups.get_data_parallel_group(with_context_parallel=True)
            )
            _all_reduce(parameter.grad, data)
            if getattr(parameter, "sequence_parallel", False) or any(part in name for part in HEAD_NORMS):
                _all_reduce(parameter.grad, groups.get_tensor_model_parallel_group())
        for parameter in model.parameters():
            if getattr(parameter, "shared_embedding", False):
                _all_reduce(parameter.grad, groups.get_embedding_group())


def gradient_norm(model: nn.Module, groups: Any, split: Collection[nn.Parameter]) -> float:
    """The 2-norm of the whole model's gradient, each number counted once; the same in every process.

    ``split`` are the parameters of which processes that share a layer have other numbers.
    """
    is_first = groups.get_tensor_model_parallel_rank() == 0
    squares = {False: 0.0, True: 0.0}
    for parameter in model.parameters():
        is_copy = getattr(parameter, "shared", False)
        if parameter.grad is not None and not is_copy and (is_first or parameter in split):
            squares[is_expert(parameter)] += float(parameter.grad.double().square().sum())
    device = next(model.parameters()).device
    total = torch.tensor([squares[False], squares[True]], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=groups.get_model_parallel_group())
    experts = total[1:].clone()
    dist.all_reduce(experts, group=groups.get_expert_model_parallel_group())
    return float((total[0] + experts[0]).sqrt())


def scale_gradients(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether the parameter belongs to experts that other processes do not have; Megatron marks those of dense layers."""
    return not getattr(parameter, "allreduce", True)


def _all_reduce(gradient: torch.Tensor | None, group: Any) -> None:
    if gradient is not None and group.size() > 1:
        dist.all_reduce(gradient, group=group)
