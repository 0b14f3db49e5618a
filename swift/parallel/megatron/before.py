"""The reference that is a model without its adapter, where a schedule computes all batches of a step together.

A loss is computed within a schedule, which cannot begin another. So what the reference gives for the batches of a step is
computed before the step, by a schedule of forward passes alone, and lies with the batches then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from swift.model.batch import Batch


class Before:
    """The log-probabilities that a model without its adapter gives; each batch of a step brings them."""

    def put(self, batches: Sequence[Batch], run: Callable[[Any], Any]) -> list[Batch]:
        """``batches`` with them; ``run`` computes an objective of the batches without the adapter. They are where losses are computed."""
        kept = _Kept()
        run(kept)
        if not kept.found:  # a stage without logits
            return list(batches)
        return [replace(batch, reference_logps=logps) for batch, logps in zip(batches, kept.found, strict=False)]  # more fill a schedule

    def logps(self, batch: Batch) -> Tensor:
        """(num_documents,) float32: what ``put`` has put there."""
        assert batch.reference_logps is not None, "the strategy computes them before a step"
        return batch.reference_logps

    @contextmanager
    def root(self, ids_P: Tensor | None, document_length: int | None = None) -> Iterator[None]:
        assert ids_P is None
        yield


class _Kept:
    """An objective that keeps the log-probabilities of each batch."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def loss_sum(self, policy: Any, reference: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.found.append(policy.logps(batch))
        return self.found[-1].sum(), {}
