"""The contract of an objective."""

from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Tensor]


class Objective(Protocol):
    """A loss as a sum over items and the number of items, so that no batch shape changes it."""

    layout: str  # the rows it needs: "sft", "preference", ...
    needs_reference: bool

    def count(self, batch: Batch) -> float:
        """The number by which the trainer divides, of this batch; known without the model."""

    def loss_sum(self, policy: Any, reference: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over items, and sums of metrics to be divided by the same count."""
