"""Log-probabilities without full logits, for losses that are no sum over tokens: their gradient is known after all of them."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swift.model.chunked import Head, detached, part_maker, parts
from swift.model.vocabulary import VocabularyPart

# K positions, D model width, V vocabulary, S predictions, C positions of a part


def chunked_logps(
    head: Head | Tensor,
    parameters: Sequence[Tensor],
    hidden_KD: Tensor,
    row_S: Tensor,
    target_S: Tensor,
    *,
    vocabulary: int,
    part: VocabularyPart | None = None,
) -> Tensor:
    """(S,) float32 log p(target); arguments as of ``chunked_cross_entropy``.

    Logits are made for some positions at a time and never kept. Of a frozen head the gradient of each prediction by its hidden
    state is taken in the forward pass, (S, D) in all, so that no logits are computed twice. A head that is trained runs once
    more in the backward pass, since its gradient needs the weight of each prediction first.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    needs_grad = torch.is_grad_enabled() and (hidden_KD.requires_grad or bool(trained))
    logps: Tensor = _ChunkedLogps.apply(detached(head, hidden_KD), vocabulary, part, needs_grad, hidden_KD, row_S, target_S, *trained)
    return logps


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head | Tensor,
        vocabulary: int,
        own: VocabularyPart | None,
        needs_grad: bool,
        hidden: Tensor,
        row: Tensor,
        target: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.is_frozen = needs_grad and not parameters
        states, rows = hidden.detach(), row
        if ctx.is_frozen:  # each prediction has a state of its own: those that share a position have other gradients
            states, rows = states.index_select(0, row), torch.arange(len(row), device=row.device)
        gradients = torch.empty_like(states) if ctx.is_frozen else None
        logps = hidden.new_empty(len(row), dtype=torch.float32)
        part_of = part_maker(head, parameters, [], states, vocabulary, own)
        for part, some in parts(part_of.size, len(states), rows):
            ones = logps.new_ones(some.stop - some.start)
            losses, _, gradient = part_of(states[part], rows[some] - part.start, target[some], ones, needs_grad=ctx.is_frozen)
            logps[some] = -losses
            if gradients is not None and gradient is not None:
                gradients[part] = gradient
        if gradients is not None:
            ctx.save_for_backward(row, gradients)
        elif needs_grad:
            ctx.save_for_backward(row, target, hidden, *parameters)
        ctx.head, ctx.vocabulary, ctx.own, ctx.count = head, vocabulary, own, len(hidden)
        device = hidden.device.type
        ctx.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        return logps

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Any, ...]:
        row, *kept = ctx.saved_tensors
        if ctx.is_frozen:
            (of_loss,) = kept  # the loss of a prediction is minus its log-probability
            grad_hidden = of_loss.new_zeros(ctx.count, of_loss.shape[1]).index_add_(0, row, of_loss * -grad_S[:, None].to(of_loss.dtype))
            return (None, None, None, None, grad_hidden, None, None)
        target, hidden, *parameters = kept
        grad_hidden, grads = torch.empty_like(hidden), [torch.zeros_like(parameter) for parameter in parameters]
        part_of = part_maker(ctx.head, parameters, grads, hidden, ctx.vocabulary, ctx.own)
        alone = ctx.own.alone() if ctx.own is not None else contextlib.nullcontext()
        with alone, torch.autocast(**ctx.autocast):  # a backward pass begins outside of it
            for part, some in parts(part_of.size, len(hidden), row):
                predictions = row[some] - part.start, target[some], -grad_S[some]
                gradient = part_of(hidden[part].detach(), *predictions, needs_grad=True)[2]
                assert gradient is not None
                grad_hidden[part] = gradient
        return (None, None, None, None, grad_hidden, None, None, *grads)
