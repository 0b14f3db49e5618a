"""Examples to padded batches of tensors."""

# B examples of a batch, T tokens of the longest
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from swift.errors import ConfigError

IGNORED = -100
Batch = dict[str, torch.Tensor]


def collate(
    examples: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """input_ids, attention_mask and labels (B, T) int64; weights (B, T) float32 if an example has them.

    Padding has label -100, weight 0 and mask 0. ``label`` (B,) or (B, N) and ``margin`` (B,) float32 are there if every
    example has one. With ``pad_to_multiple_of`` T is the next multiple of it.
    """
    if padding_side not in ("right", "left"):
        raise ConfigError(f"padding_side is {padding_side!r}", hint="use right or left")
    longest = max(len(example["input_ids"]) for example in examples)
    step = pad_to_multiple_of or 1
    shape = (len(examples), -(-longest // step) * step)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    if any(example.get("weights") is not None for example in examples):
        batch["weights"] = torch.zeros(shape, dtype=torch.float32)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        place = slice(0, length) if padding_side == "right" else slice(shape[1] - length, shape[1])
        batch["input_ids"][row, place] = torch.tensor(example["input_ids"], dtype=torch.int64)
        batch["labels"][row, place] = torch.tensor(example["labels"], dtype=torch.int64)
        batch["attention_mask"][row, place] = 1
        if "weights" in batch:
            weights = example.get("weights")
            batch["weights"][row, place] = 1.0 if weights is None else torch.tensor(weights, dtype=torch.float32)
    for name in ("label", "margin"):
        if all(example.get(name) is not None for example in examples):
            values = torch.tensor([example[name] for example in examples])
            batch[name] = values.float() if name == "margin" else values
    return batch


def collate_pairs(
    examples: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """A batch of 2B rows: the chosen side of every pair, then the rejected side of every pair in the same order."""
    sides = [example[side] for side in ("chosen", "rejected") for example in examples]
    batch = collate(sides, pad_token_id=pad_token_id, padding_side=padding_side, pad_to_multiple_of=pad_to_multiple_of)
    if all(example.get("margin") is not None for example in examples):
        batch["margin"] = torch.tensor([float(example["margin"]) for example in examples])
    return batch
