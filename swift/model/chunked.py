"""Cross-entropy without full logits: the head runs on some positions at a time, and each part's gradient is taken at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The logits of one part, as float32. On a CPU just below the size from which glibc maps and unmaps memory at each use.
CPU_CHUNK_BYTES = 30 * 2**20
CHUNK_BYTES = 256 * 2**20

# K positions, D model width, V vocabulary, S predictions, C positions of a part

Head = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    head: Head,
    parameters: Sequence[Tensor],
    hidden_KD: Tensor,
    row_S: Tensor,
    target_S: Tensor,
    weight_S: Tensor,
    *,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """(sum of weight times -log p(target), number of right predictions whose weight is not 0); float32 scalars.

    ``head`` gives the logits (C, V) of hidden states (C, D). Its gradients, and those of its trained ``parameters``,
    are computed in the forward pass (as Hsu et al. 2024, arXiv:2410.10989, do on a GPU), so that no logits are kept and
    none are computed twice. ``row_S`` must be ascending.
    """
    size = CPU_CHUNK_BYTES if hidden_KD.device.type == "cpu" else CHUNK_BYTES
    rows_a_part = max(1, size // (4 * vocabulary))
    result: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(
        head,
        rows_a_part,
        torch.is_grad_enabled(),
        hidden_KD,
        row_S,
        target_S,
        weight_S,
        *[parameter for parameter in parameters if parameter.requires_grad],
    )
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        rows_a_part: int,
        is_training: bool,
        hidden: Tensor,
        row: Tensor,
        target: Tensor,
        weight: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = is_training and any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grads = [torch.zeros_like(parameter) for parameter in parameters] if needs_grad else []
        loss = hidden.new_zeros((), dtype=torch.float32)
        right = hidden.new_zeros((), dtype=torch.float32)
        starts = list(range(0, len(hidden), rows_a_part))
        ends = torch.searchsorted(row, torch.tensor([*starts[1:], len(hidden)][: len(starts)], device=row.device)).tolist()
        first = 0
        for start, last in zip(starts, ends, strict=True):
            part = slice(start, min(start + rows_a_part, len(hidden)))
            local, targets, weights = row[first:last] - start, target[first:last], weight[first:last]
            states = hidden[part].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                logits = head(states)
            gradient, part_loss, part_right = _loss_and_gradient(logits.detach(), local, targets, weights, needs_grad=needs_grad)
            loss += part_loss
            right += part_right
            if needs_grad:
                assert grad_hidden is not None
                got = torch.autograd.grad(logits, [states, *parameters], grad_outputs=gradient)
                grad_hidden[part] = got[0]
                for total, more in zip(grads, got[1:], strict=True):
                    total += more
            first = last
        if needs_grad:
            assert grad_hidden is not None
            ctx.save_for_backward(grad_hidden, *grads)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad_hidden, *grads = (gradient * grad_loss.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (None, None, None, grad_hidden, None, None, None, *grads)


def _loss_and_gradient(
    logits_CV: Tensor, row_S: Tensor, target_S: Tensor, weight_S: Tensor, *, needs_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The loss of some positions, its gradient by their logits (the softmax less the targets, weighted), and the right ones."""
    logits = logits_CV.float()
    likeliest_C = logits.argmax(dim=-1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    # The largest probability is never small, so its logarithm is exact to the last digits. That the softmax adds up its
    # many terms one by one costs it some digits: what is missing to 1 corrects for that.
    lse_C = (logits.gather(1, likeliest_C) - probabilities.gather(1, likeliest_C).log()).squeeze(1) + probabilities.sum(dim=-1).log()
    loss = (weight_S * (lse_C[row_S] - logits[row_S, target_S])).sum()
    is_right_S = (likeliest_C.squeeze(1)[row_S] == target_S) & (weight_S != 0)
    if not needs_grad:
        return None, loss, is_right_S.sum().float()
    share_C = torch.zeros_like(lse_C).index_add_(0, row_S, weight_S)
    if (share_C != 1).any():
        probabilities.mul_(share_C[:, None])
    gradient = probabilities.index_put_((row_S, target_S), -weight_S, accumulate=True)
    return gradient.to(logits_CV.dtype), loss, is_right_S.sum().float()
