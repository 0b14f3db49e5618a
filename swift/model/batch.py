"""What one forward pass computes, and which tokens of it are to be predicted."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swift.model.layout import Layout

# B rows, T tokens of a row, K positions whose prediction is wanted, S predictions


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens and predictions; rows padded to one length (``attention_mask``), or one flat row of documents (``layout``).

    Positions count over the flattened (B * T) tokens. A position may predict several tokens: the last one of a shared
    beginning predicts the first token of each document that continues it.
    """

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor | None = None  # (B, T) int64
    attention_mask: Tensor | None = None  # (B, T) int64, 1 where no padding is
    layout: Layout | None = None
    root_ids: Tensor | None = None  # (P,) int64: the layout's root, the same of all batches of a step
    kept_K: Tensor  # int64, ascending: positions that predict something
    row_S: Tensor  # int64: index into kept_K of each prediction
    target_S: Tensor  # int64: the token that is right
    weight_S: Tensor  # float32
    document_S: Tensor  # int64: to which document of the batch a prediction belongs
    num_documents: int
    num_tokens: int  # of the documents, as if nothing were shared; padding is none
    reference_logps: Tensor | None = None  # (num_documents,) float32: of another model, if they were computed before

    def to(self, device: torch.device) -> "Batch":
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    @property
    def num_computed(self) -> int:
        """Tokens that the forward pass computes: padding counts, a shared beginning counts once."""
        return self.input_ids.numel()
