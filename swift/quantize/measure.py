"""What was lost: predictions of a written model beside those of the original, on held-out text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from swift.model.artifact import ModelFolder
from swift.model.load import load_model

# T tokens of a piece, V vocabulary


@dataclass(frozen=True)
class Measured:
    """Over all places of the text: mean divergence (nats), perplexities, share of equal likeliest tokens.

    ``loader`` names what computed the predictions, with its version; ``notes`` say what was not measured, and why.
    """

    loader: str | None
    tokens: int = 0
    kl: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    same_token: float | None = None
    largest_difference: float | None = None
    notes: tuple[str, ...] = ()


class Reference:
    """The original model and held-out text as pieces of token ids; its weights are read when predictions are first asked for."""

    def __init__(self, model: ModelFolder, pieces: list[list[int]]) -> None:
        self.model = model
        self.pieces = pieces

    @cached_property
    def loaded(self) -> Any:
        return load_model(self.model.path, torch_dtype="float32", device="cpu").model

    @torch.no_grad()
    def log_probabilities(self, piece: list[int]) -> Tensor:
        """(T, V) in float32: of every next token."""
        logits: Tensor = self.loaded(input_ids=torch.tensor([piece]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    def compare(self, loader: str, logits: Callable[[list[int]], Any]) -> Measured:
        """``logits`` gives (T, V) for a piece: an array or a tensor."""
        tally = Tally()
        for piece in self.pieces:
            found = torch.as_tensor(logits(piece)).float().log_softmax(-1)
            tally.add(self.log_probabilities(piece), found, piece)
        return tally.result(loader)


class Tally:
    """Sums over places, so that no more than one piece is in memory."""

    def __init__(self) -> None:
        self.places = self.targets = 0
        self.kl = self.before = self.after = self.same = self.largest = 0.0

    def add(self, wanted: Tensor, found: Tensor, ids: list[int]) -> None:
        """Log-probabilities (T, V) of the original and of the written model at the tokens ``ids`` (T,) of a piece."""
        following = torch.tensor(ids[1:], device=wanted.device)[:, None]
        self.places += len(ids)
        self.targets += len(ids) - 1
        probability = wanted.exp()
        gap = wanted - found
        self.kl += float((probability * gap).sum())
        self.before -= float(wanted[:-1].gather(1, following).sum())
        self.after -= float(found[:-1].gather(1, following).sum())
        self.same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        self.largest = max(self.largest, float(gap.abs().mul_(wanted > -6.9).max()))

    def result(self, loader: str | None) -> Measured:
        before, after = (float(torch.tensor(total / self.targets).exp()) for total in (self.before, self.after))
        return Measured(loader, self.places, self.kl / self.places, before, after, self.same / self.places, self.largest)
