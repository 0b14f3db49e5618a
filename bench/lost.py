"""What models in few bits lost: all of them beside the original, in one pass over held-out text, by one program."""

import json
from pathlib import Path
from typing import Any

import torch
from dense import dense

from swift.model.load import load_model
from swift.quantize.measure import Tally


@torch.inference_mode()
def measure(model: Path, checkpoints: dict[str, Path], text: Path, threads: int) -> dict[str, dict[str, Any]]:
    """Perplexity, KL from ``model`` in float32 and the share of equal likeliest tokens, of each checkpoint by its name.

    Every checkpoint becomes float32 weights of the original's architecture (dense.py), so that all differences are in
    the weights. All models are in memory at once, predictions of one piece of text at a time.
    """
    torch.set_num_threads(threads)
    original = load_model(model, torch_dtype="float32", device="cpu").model
    others = {name: _filled(model, folder) for name, folder in checkpoints.items()}
    tallies = {name: Tally() for name in others}
    for line in text.read_text().splitlines():
        ids = json.loads(line)
        wanted = _log_probabilities(original, ids)
        for name, other in others.items():
            tallies[name].add(wanted, _log_probabilities(other, ids), ids)
    found = {}
    for name, tally in tallies.items():
        seen = tally.result(None)
        found[name] = {
            "perplexity": seen.perplexity_after,
            "perplexity_before": seen.perplexity_before,
            "kl": seen.kl,
            "same_token": seen.same_token,
        }
    return found


def _filled(model: Path, checkpoint: Path) -> Any:
    made = load_model(model, torch_dtype="float32", device="cpu").model
    tensors = dense(checkpoint)
    absent, unknown = made.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if made.config.tie_word_embeddings else set()
    if unknown or set(absent) - tied:
        raise SystemExit(f"{checkpoint}: without {sorted(set(absent) - tied)[:3]}, with {unknown[:3]}, which the model has not")
    return made


def _log_probabilities(model: Any, ids: list[int]) -> Any:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
