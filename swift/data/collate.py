"""Examples to batches: one flat row of documents, or rows padded to one length."""

# B examples of a batch, T tokens of the longest or of the flat row, K positions that predict, S predictions
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from swift.data.prefix import common_root, flatten
from swift.errors import ConfigError
from swift.model.batch import Batch

IGNORED = -100
Example = Mapping[str, Any]  # input_ids, labels, and weights or none; of a pair chosen and rejected


def documents(examples: Sequence[Example]) -> list[Example]:
    """The sequences of ``examples`` in order; a pair is two of them, the chosen one and then the rejected one."""
    found: list[Example] = []
    for example in examples:
        if "chosen" not in example:
            found.append(example)
            continue
        logps = example.get("reference_logps", (None, None))
        found += [{**example[side], "reference_logps": logp} for side, logp in zip(("chosen", "rejected"), logps, strict=True)]
    return found


def flat_batches(passes: Sequence[Sequence[Example]], *, share: bool = True, root: bool = True) -> list[Batch]:
    """A flat batch for each forward pass of a step; if ``share`` and ``root``, what all examples begin with is the root of all batches.

    The largest one comes first, so that the memory it leaves is enough for each of the others.
    """
    shared = 0
    passes = [documents(part) for part in passes]
    if share and root and len(passes) > 1:
        examples = [example for part in passes for example in part]
        shared = common_root([_array(example["input_ids"]) for example in examples], [_array(example["labels"]) for example in examples])
    return sorted((flat_batch(part, share=share, root=shared) for part in passes), key=lambda batch: -batch.num_computed)


def flat_batch(examples: Sequence[Example], *, share: bool = True, root: int = 0) -> Batch:
    """One row (1, T) without padding; beginnings that examples have in common are computed once if ``share``.

    The first ``root`` tokens, the same of all examples, are left out: they are ``root_ids``.
    """
    examples = documents(examples)
    whole = [_array(example["input_ids"]) for example in examples]
    num_tokens = _tokens(examples)
    before = _reference_logps(examples)
    flat = flatten([ids[root:] for ids in whole], share=share, root=root)
    if root:
        examples = [{name: example[name][root:] for name in ("labels", "weights") if example.get(name) is not None} for example in examples]
    return Batch(
        input_ids=torch.from_numpy(flat.input_ids)[None],
        position_ids=flat.layout.position_ids(),
        layout=flat.layout,
        num_documents=len(examples),
        root_ids=torch.from_numpy(whole[0][:root].copy()) if root else None,
        num_tokens=num_tokens,
        reference_logps=before,
        **_predictions(examples, flat.places),
    )


def _tokens(examples: Sequence[Example]) -> int:
    """Tokens of ``examples``; what only fills a pass has none."""
    return sum(len(example["input_ids"]) for example in examples if not example.get("is_filler"))


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def padded_batch(
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Rows (B, T) of the longest example's length, or the next multiple of ``pad_to_multiple_of``."""
    if padding_side not in ("right", "left"):
        raise ConfigError(f"padding_side is {padding_side!r}", hint="use right or left")
    examples = documents(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    step = pad_to_multiple_of or 1
    width = -(-max(lengths) // step) * step
    input_ids = np.full((len(examples), width), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(examples), width), dtype=np.int64)
    places = []
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        start = 0 if padding_side == "right" else width - length
        input_ids[row, start : start + length] = example["input_ids"]
        attention_mask[row, start : start + length] = 1
        places.append(np.arange(row * width + start, row * width + start + length))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        num_documents=len(examples),
        num_tokens=_tokens(examples),
        reference_logps=_reference_logps(examples),
        **_predictions(examples, places),
    )


def _reference_logps(examples: Sequence[Example]) -> torch.Tensor | None:
    """What each example brings of them; None unless all do."""
    values = [example.get("reference_logps") for example in examples]
    return None if any(value is None for value in values) else torch.tensor(values, dtype=torch.float32)


def _predictions(examples: Sequence[Example], places: Sequence[np.ndarray]) -> dict[str, Any]:
    """Which position predicts which token: every trained token but a document's first, by the one before it."""
    positions, targets, weights, documents = [], [], [], []
    for document, (example, place) in enumerate(zip(examples, places, strict=True)):
        labels = np.asarray(example["labels"], dtype=np.int64)
        trained = np.flatnonzero(labels[1:] != IGNORED)
        given = example.get("weights")
        positions.append(place[trained])
        targets.append(labels[trained + 1])
        weights.append(np.ones(len(trained), np.float32) if given is None else np.asarray(given, np.float32)[trained + 1])
        documents.append(np.full(len(trained), document))
    position = np.concatenate(positions)
    order = np.argsort(position, kind="stable")
    kept, row = np.unique(position[order], return_inverse=True)
    return {
        "kept_K": torch.from_numpy(kept),
        "row_S": torch.from_numpy(row),
        "target_S": torch.from_numpy(np.concatenate(targets)[order]),
        "weight_S": torch.from_numpy(np.concatenate(weights)[order]),
        "document_S": torch.from_numpy(np.concatenate(documents)[order]),
    }
