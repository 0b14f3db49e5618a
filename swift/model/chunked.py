"""Cross-entropy without full logits: the head runs on some positions at a time, and each part's gradient is taken at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swift.model.vocabulary import VocabularyPart

# The logits of one part, as float32. On a CPU just below the size from which glibc maps and unmaps memory at each use.
CPU_CHUNK_BYTES = 30 * 2**20
CHUNK_BYTES = 256 * 2**20
# A product on a CPU has one buffer for all parts. Its positions, if the bytes allow fewer, and what they are a multiple of,
# lest each row of the logits begins in the middle of a cache line (213 positions took 1.4 times as long as 208).
BUFFER_BYTES = 48 * 2**20
LEAST_POSITIONS = 128
ALIGNED_POSITIONS = 16

# K positions, D model width, V vocabulary, S predictions, C positions of a part

Head = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    head: Head | Tensor,
    parameters: Sequence[Tensor],
    hidden_KD: Tensor,
    row_S: Tensor,
    target_S: Tensor,
    weight_S: Tensor,
    *,
    vocabulary: int,
    part: VocabularyPart | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of weight times -log p(target), number of right predictions whose weight is not 0); float32 scalars.

    ``head`` gives the logits (C, V) of hidden states (C, D); if it is nothing but a product with a weight (V, D), it is
    that weight. Its gradients, and those of its trained ``parameters``, are computed in the forward pass (as Hsu et al.
    2024, arXiv:2410.10989, do on a GPU), so that no logits are kept and none are computed twice. ``row_S`` must be ascending.

    With a ``part`` of the vocabulary, logits and weight are those of this part, and the gradient of the hidden states is this
    process's share of it. ``vocabulary`` must then be the same in all processes of the group, lest they cut otherwise.
    """
    result: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(
        detached(head, hidden_KD),
        vocabulary,
        part,
        torch.is_grad_enabled(),
        hidden_KD,
        row_S,
        target_S,
        weight_S,
        *[parameter for parameter in parameters if parameter.requires_grad],
    )
    return result


def most_bytes(head: Head | Tensor, positions: int, vocabulary: int, device: torch.device) -> int:
    """Bytes of the logits, softmax and gradients of as many positions as are computed at one time."""
    if isinstance(head, Tensor) and head.device.type == "cpu" and head.dtype == torch.float32:
        return 4 * vocabulary * min(_aligned(positions), _most_positions(vocabulary))
    return 3 * min(CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES, 4 * positions * vocabulary)


def _most_positions(vocabulary: int) -> int:
    """Positions of a product's part."""
    return _aligned(max(BUFFER_BYTES // (4 * vocabulary), LEAST_POSITIONS))


def detached(head: Head | Tensor, hidden: Tensor) -> Head | Tensor:
    """``head`` as a part takes it: a weight whose gradient the part computes itself is no variable of its graph."""
    return head.detach() if isinstance(head, Tensor) and _has_product(head, hidden) else head


def _has_product(weight: Tensor, hidden: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == hidden.dtype == torch.float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head | Tensor,
        vocabulary: int,
        part_of_vocabulary: VocabularyPart | None,
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
        part_of = part_maker(head, parameters, grads, hidden, vocabulary, part_of_vocabulary)
        for part, some in parts(part_of.size, len(hidden), row):
            predictions = row[some] - part.start, target[some], weight[some]
            part_loss, part_right, gradient = part_of(hidden[part].detach(), *predictions, needs_grad=needs_grad)
            loss += part_loss.sum()
            right += part_right
            if grad_hidden is not None and gradient is not None:
                grad_hidden[part] = gradient
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grads)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad_hidden, *grads = (gradient * grad_loss.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (None, None, None, None, grad_hidden, None, None, None, *grads)


def part_maker(
    head: Head | Tensor,
    parameters: Sequence[Tensor],
    grads: list[Tensor],
    hidden: Tensor,
    vocabulary: int,
    part: VocabularyPart | None = None,
) -> "_Product | _AnyHead":
    """What computes a part of ``hidden`` (K, D); its gradients by ``parameters`` are added to ``grads``."""
    if isinstance(head, Tensor) and _has_product(head, hidden):
        return _Product(head, grads, len(hidden), _most_positions(vocabulary), part)
    most = (CPU_CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES) // (4 * vocabulary)
    return _AnyHead(head, parameters, grads, max(most, 1), part)


def parts(size: int, count: int, row_S: Tensor) -> Iterator[tuple[slice, slice]]:
    """(positions, their predictions) of each ``size`` of ``count`` positions; ``row_S`` is ascending."""
    starts = list(range(0, count, size))
    ends = torch.searchsorted(row_S, torch.tensor([*starts[1:], count][: len(starts)], device=row_S.device)).tolist()
    first = 0
    for start, last in zip(starts, ends, strict=True):
        yield slice(start, min(start + size, count)), slice(first, last)
        first = last


class _AnyHead:
    """The losses of the predictions of ``size`` positions, and their sum's gradient by hidden states; in ``grads`` by ``parameters``."""

    def __init__(
        self, head: Head | Tensor, parameters: Sequence[Tensor], grads: list[Tensor], size: int, part: VocabularyPart | None
    ) -> None:
        self.head, self.parameters, self.grads, self.size, self.part = head, parameters, grads, size, part

    def __call__(
        self, states: Tensor, row: Tensor, target: Tensor, weight: Tensor, *, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        states = states.requires_grad_(needs_grad)
        with torch.set_grad_enabled(needs_grad):
            logits = F.linear(states, self.head) if isinstance(self.head, Tensor) else self.head(states)
        if self.part is None:
            gradient, loss, right = _loss_and_gradient(logits.detach(), row, target, weight, needs_grad=needs_grad)
        else:
            logits_VC = logits.detach().float().T.clone()
            loss, right = _loss_in_place(logits_VC, row, target, weight, needs_grad=needs_grad, part=self.part)
            gradient = logits_VC.T.to(logits.dtype) if needs_grad else None
        if gradient is None:
            return loss, right, None
        got = torch.autograd.grad(logits, [states, *self.parameters], grad_outputs=gradient)
        for total, more in zip(self.grads, got[1:], strict=True):
            total += more
        return loss, right, got[0]


class _Product:
    """The same for logits that are a product with ``weight`` (V, D), in float32 on a CPU.

    The vocabulary comes first: a product with many rows and few columns is the faster one there. The logits become their
    gradient in place.
    """

    def __init__(self, weight: Tensor, grads: list[Tensor], count: int, most: int, part: VocabularyPart | None) -> None:
        parts = max(1, -(-count // most))
        self.part = part
        self.weight, self.grads, self.size = weight, grads, max(1, _aligned(-(-count // parts)))
        self.buffer = weight.new_empty(len(weight) * self.size)

    def __call__(
        self, states: Tensor, row: Tensor, target: Tensor, weight: Tensor, *, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        count, width = len(states), _aligned(len(states))
        states = F.pad(states, (0, 0, 0, width - count))
        logits_VC = self.buffer[: len(self.weight) * width].view(-1, width)
        torch.mm(self.weight, states.T, out=logits_VC)
        loss, right = _loss_in_place(logits_VC, row, target, weight, needs_grad=needs_grad, part=self.part)
        if not needs_grad:
            return loss, right, None
        for total in self.grads:
            total.addmm_(logits_VC, states)
        return loss, right, (self.weight.T @ logits_VC).T[:count]


def _loss_in_place(
    logits_VC: Tensor, row: Tensor, target: Tensor, weight: Tensor, *, needs_grad: bool, part: VocabularyPart | None
) -> tuple[Tensor, Tensor]:
    """The loss of some positions and the right ones; the logits, all or those of ``part``, become their gradient."""
    most_C = logits_VC.amax(dim=0) if part is None else part.largest_of(logits_VC.amax(dim=0))
    place, taken = target, weight
    if part is not None:
        place, is_here = part.places(target)
        taken = weight * is_here
    wanted_S = logits_VC[place, row]
    powers_VC = logits_VC.sub_(most_C).exp_()
    sum_C = powers_VC.sum(dim=0)
    if part is not None:
        sum_C, wanted_S = part.sums_of(sum_C, wanted_S * is_here)
    loss = weight * ((most_C + sum_C.log())[row] - wanted_S)
    right = ((wanted_S == most_C[row]) & (weight != 0)).sum().float()
    if needs_grad:
        share_C = torch.zeros_like(sum_C).index_add_(0, row, weight)
        powers_VC.mul_(share_C / sum_C).index_put_((place, row), -taken, accumulate=True)
    return loss, right


def _aligned(positions: int) -> int:
    return -(-positions // ALIGNED_POSITIONS) * ALIGNED_POSITIONS


def _loss_and_gradient(
    logits_CV: Tensor, row_S: Tensor, target_S: Tensor, weight_S: Tensor, *, needs_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(loss of each prediction of some positions, gradient of their sum by the logits, number of right ones).

    The gradient is the softmax less the targets, weighted.
    """
    logits = logits_CV.float()
    likeliest_C = logits.argmax(dim=-1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    # The largest probability is never small, so its logarithm is exact to the last digits. That the softmax adds up its
    # many terms one by one costs it some digits: what is missing to 1 corrects for that.
    lse_C = (logits.gather(1, likeliest_C) - probabilities.gather(1, likeliest_C).log()).squeeze(1) + probabilities.sum(dim=-1).log()
    loss = weight_S * (lse_C[row_S] - logits[row_S, target_S])
    is_right_S = (likeliest_C.squeeze(1)[row_S] == target_S) & (weight_S != 0)
    if not needs_grad:
        return None, loss, is_right_S.sum().float()
    share_C = torch.zeros_like(lse_C).index_add_(0, row_S, weight_S)
    if (share_C != 1).any():
        probabilities.mul_(share_C[:, None])
    gradient = probabilities.index_put_((row_S, target_S), -weight_S, accumulate=True)
    return gradient.to(logits_CV.dtype), loss, is_right_S.sum().float()
