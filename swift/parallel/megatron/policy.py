"""What objectives see of a Megatron model: the predictions of a batch from logits whose vocabulary is spread over processes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from swift.model.batch import Batch
from swift.parallel.megatron import package
from swift.parallel.megatron.before import Before

# B rows, T tokens of a row, S predictions, P columns of the vocabulary that a process has


class MegatronPolicy:
    """A policy whose logits the schedule has computed; outside of a schedule, it runs a forward pass through the stages."""

    router_aux_loss_coef = 0.0

    def __init__(self, model: Any, group: Any, vocab_size: int, alone: Callable[[Batch], Tensor]) -> None:
        """``alone`` gives ``logps`` of a batch outside of a schedule, in every process."""
        self.model, self.inner, self.group, self.vocab_size = model, model.shell, group, vocab_size
        self._alone = alone
        self.logits_BTP: Tensor | None = None

    def cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of weight times -log p(target), number of right predictions), the same in all processes that share the batch."""
        losses_S, right_S = self.losses(batch)
        return (losses_S * batch.weight_S).sum(), (right_S & (batch.weight_S != 0)).sum()

    def logps(self, batch: Batch) -> Tensor:
        """(num_documents,) float32: the sum of weight times log p(target) over the predictions of each document."""
        if self.logits_BTP is None:
            return self._alone(batch)
        losses_S = self.losses(batch)[0]
        return losses_S.new_zeros(batch.num_documents).index_add(0, batch.document_S, -losses_S * batch.weight_S)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """((S,) minus the log-probability of each target, float32; (S,) whether it is the likeliest token); within a schedule."""
        assert self.logits_BTP is not None, "the schedule gives logits"
        places_S = batch.kept_K.index_select(0, batch.row_S)
        logits_SP = self.logits_BTP.flatten(0, 1).index_select(0, places_S).float()
        first = self.group.rank() * logits_SP.shape[1]
        columns_P = torch.arange(first, first + logits_SP.shape[1], device=logits_SP.device)
        # The rows of zeros that pad the vocabulary are no tokens.
        logits_SP = logits_SP.masked_fill(columns_P >= self.vocab_size, torch.finfo(torch.float32).min)
        right_S = self._likeliest(logits_SP.detach(), columns_P) == batch.target_S
        losses_S: Tensor = package.part("tensor_parallel").vocab_parallel_cross_entropy(logits_SP, batch.target_S)
        return losses_S, right_S

    def without_adapter(self) -> Before:
        """The reference that is this model without its adapter."""
        return Before()

    @contextlib.contextmanager
    def with_logits(self, logits_BTP: Tensor) -> Iterator[None]:
        self.logits_BTP = logits_BTP
        try:
            yield
        finally:
            self.logits_BTP = None

    @contextlib.contextmanager
    def root(self, ids_P: Tensor | None, document_length: int | None = None) -> Iterator[None]:
        assert ids_P is None  # the beginning of a whole step would have to be computed outside of the schedule
        yield

    def _likeliest(self, logits_SP: Tensor, columns_P: Tensor) -> Tensor:
        """(S,) the token of the largest logit over all processes; the first of equals, as argmax has it."""
        largest_S, place_S = logits_SP.max(dim=1)
        best_S, token_S = largest_S.clone(), columns_P[place_S]
        dist.all_reduce(best_S, dist.ReduceOp.MAX, group=self.group)
        token_S = torch.where(largest_S == best_S, token_S, torch.iinfo(torch.int64).max)
        dist.all_reduce(token_S, dist.ReduceOp.MIN, group=self.group)
        return token_S
