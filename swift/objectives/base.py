"""The contract of an objective, and what it sees of a model and a batch."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class Batch(Protocol):
    """The predictions of a batch: S of them, each of one token of one document. Documents 2 i and 2 i + 1 are pair i, if rows are pairs."""

    @property
    def weight_S(self) -> Tensor: ...
    @property
    def document_S(self) -> Tensor: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def reference_logps(self) -> Tensor | None: ...


class Reference(Protocol):
    """A model that is compared with: nothing of it is trained, and it is computed without gradients or dropout."""

    def logps(self, batch: Any) -> Tensor:
        """(num_documents,) float32: the sum of weight times log p over the predictions of each document."""

    def root(self, ids_P: Any, document_length: int | None = None) -> AbstractContextManager[None]:
        """Within, batches continue tokens that are computed once (None: there are none)."""


class Policy(Reference, Protocol):
    """A model to be trained, and how its predictions are taken; all of it is differentiable."""

    model: Any

    def cross_entropy(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of weight times -log p over the predictions, number of right ones)."""


class Objective(Protocol):
    """A loss as a sum over items and the number of items, so that no batch shape changes it."""

    layout: str  # the rows it needs: "sft", "preference", ...
    needs_reference: bool
    items: str  # what it counts, as the log names it: "supervised_tokens", "pairs"

    def count(self, batch: Batch) -> float:
        """The number by which the trainer divides, of this batch; known without the model."""

    def loss_sum(self, policy: Policy, reference: Reference | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over items, and sums of metrics to be divided by the same count.

        Log-probabilities that are in the batch stand for those of ``reference``, which a pipeline computes before and does not give.
        """
