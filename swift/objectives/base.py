"""The contract of an objective, and what it sees of a model and a batch."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class Batch(Protocol):
    """The predictions of a batch: S of them, each of one token of one document."""

    @property
    def weight_S(self) -> Tensor: ...
    @property
    def document_S(self) -> Tensor: ...
    @property
    def num_documents(self) -> int: ...


class Policy(Protocol):
    """A model to be trained, and how its predictions are taken."""

    model: Any

    def cross_entropy(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of weight times -log p over the predictions, number of right ones)."""

    def root(self, ids_P: Any, document_length: int | None = None) -> AbstractContextManager[None]:
        """Within, batches continue tokens that are computed once (None: there are none)."""


class Objective(Protocol):
    """A loss as a sum over items and the number of items, so that no batch shape changes it."""

    layout: str  # the rows it needs: "sft", "preference", ...
    needs_reference: bool

    def count(self, batch: Batch) -> float:
        """The number by which the trainer divides, of this batch; known without the model."""

    def loss_sum(self, policy: Policy, reference: Policy | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over items, and sums of metrics to be divided by the same count."""
