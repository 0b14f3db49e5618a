"""Predictions on which Megatron's model and transformers' are compared before anything is trained."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swift.data.collate import flat_batch, padded_batch
from swift.data.prefix import MIN_SHARED
from swift.model.batch import Batch
from swift.model.policy import probe_ids

# S predictions


def probe(model: Any, *, is_flat: bool) -> tuple[Batch, Tensor]:
    """(a batch, the log-probability (S,) float32 that the transformers ``model`` gives to each of its predictions).

    Each prediction is a document by itself to the batch, so that ``logps`` tells them apart. Of flat rows: three documents,
    two of which share a beginning, side by side; ``model`` computes each alone.
    """
    ids, shared = probe_ids(model, MIN_SHARED + 14)[0], MIN_SHARED
    rows = [ids[:8]] if not is_flat else [ids[: shared + 4], torch.cat([ids[:shared], ids[shared + 4 : -6]]), ids[-6:]]
    examples = [{"input_ids": row.cpu().numpy(), "labels": row.cpu().numpy()} for row in rows]
    batch = flat_batch(examples) if is_flat else padded_batch(examples, pad_token_id=0)
    predicted = [model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(dim=1) for row in rows]
    depth_T = torch.arange(len(rows[0])) if batch.position_ids is None else batch.position_ids[0]
    depths_S = depth_T[batch.kept_K[batch.row_S]].tolist()
    named = zip(batch.document_S.tolist(), depths_S, batch.target_S.tolist(), strict=True)
    wanted_S = torch.stack([predicted[document][depth, token] for document, depth, token in named])
    count = len(wanted_S)
    return replace(batch, document_S=torch.arange(count), num_documents=count), wanted_S
