"""A policy for objectives that know nothing of parts: they see whole batches, and what the whole of one gives."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from swift.model.batch import Batch
from swift.parallel.sequence.exchange import Total
from swift.parallel.sequence.share import Share
from swift.parallel.sequence.split import split


def in_parts(policy: Any, share: Share | None, of: Any = None) -> Any:
    """``policy``, which is the model ``of`` or another, as it computes its share of each sequence; a second model computes all."""
    is_another = of is not None and getattr(getattr(policy, "policy", None), "inner", None) is not of.inner
    return policy if share is None or policy is None or is_another else PartPolicy(policy, share)


class PartPolicy:
    """``policy``, each of whose passes is shared by the processes of ``share``.

    What comes out is the same in all of them, so any function of it is a loss of whole documents; it counts once, not once
    for each process. The backward pass gives every process its own part of the gradients: they are to be added up.
    """

    def __init__(self, policy: Any, share: Share) -> None:
        self.policy, self.share = policy, share
        self.model = getattr(policy, "model", None)  # a reference has none that is trained
        self.router_aux_loss_coef = getattr(policy, "router_aux_loss_coef", 0.0)

    def cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As of ``Policy``, of the whole batch."""
        loss, right = self.policy.cross_entropy(split(batch, self.share))
        return Total.apply(loss, self.share.group), Total.apply(right, self.share.group)

    def logps(self, batch: Batch) -> Tensor:
        """(num_documents,) as of ``Policy``, of whole documents, wherever their tokens are."""
        logps: Tensor = Total.apply(self.policy.logps(split(batch, self.share)), self.share.group)
        return logps

    def own(self, batch: Batch) -> Batch:
        """This process's part of ``batch``."""
        return split(batch, self.share)

    def decode(self, part: Batch) -> Tensor:
        """(1, t, D) the hidden states of what ``own`` gave."""
        hidden: Tensor = self.policy.decode(part)
        return hidden

    def root(self, ids_P: Tensor | None, document_length: int | None = None) -> AbstractContextManager[None]:
        """As of ``Policy``: every process computes the whole root."""
        context: AbstractContextManager[None] = self.policy.root(ids_P, document_length)
        return context
