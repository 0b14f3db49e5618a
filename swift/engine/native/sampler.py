"""The next token of each sequence, from the logits of a pass."""

import struct
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor

from swift.engine.base import Logprob, Sampling

# N rows of logits, V vocabulary, C candidates

NUCLEUS = 1024  # likeliest tokens among which the share of top_p is looked for before all are sorted


class Guide(Protocol):
    """What a grammar allows next."""

    def allowed(self, num_tokens: int) -> Tensor:
        """(num_tokens,) bool."""

    def accept(self, token: int) -> None:
        """The token was chosen."""

    def end(self) -> None:
        """The end was chosen."""

    def is_finished(self) -> bool:
        """Whether nothing can follow but the end."""


@dataclass
class Chooser:
    """What the choice of a sequence's tokens depends on. ``sampling`` has no None left."""

    sampling: Sampling
    seed: int
    prompt: frozenset[int]
    ends: tuple[int, ...]
    counts: Counter[int] = field(default_factory=Counter)  # tokens of the answer so far
    num_tokens: int = 0  # of the answer so far
    guide: Guide | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the logits are taken as they are, whatever came before."""
        sampling = self.sampling
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty != 1
        return not (any(penalties) or sampling.logit_bias or self.guide or self.num_tokens < sampling.min_new_tokens)

    def accept(self, token: int) -> bool:
        """``token`` was chosen; whether a grammar is complete with it. Raises DataError if the grammar was given up."""
        self.num_tokens += 1
        self.counts[token] += 1
        if self.guide is not None:
            if token in self.ends:  # which is allowed only where the grammar is content
                self.guide.end()
            else:
                self.guide.accept(token)
        return self.guide is not None and self.guide.is_finished()

    def change(self, logits_V: Tensor) -> None:
        """Penalties, bias, grammar and the least length, in place."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            seen = _ids(self.prompt | self.counts.keys(), logits_V)
            values = logits_V[seen]
            penalty = float(sampling.repetition_penalty or 1)
            logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if self.counts and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = torch.tensor(list(self.counts.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[_ids(self.counts, logits_V)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if sampling.logit_bias:
            bias = torch.tensor(list(sampling.logit_bias.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[_ids(sampling.logit_bias, logits_V)] += bias
        if self.guide is not None:
            logits_V.masked_fill_(~self.guide.allowed(len(logits_V)).to(logits_V.device), -torch.inf)
        if self.num_tokens < sampling.min_new_tokens:
            logits_V[_ids(self.ends, logits_V)] = -torch.inf


def choose(logits_NV: Tensor, choosers: list[Chooser], places: list[int]) -> list[int]:
    """A token for each row, float32 logits that are changed in place. ``places``: number of the token in its answer, from 0.

    Greedy where the temperature is 0. Otherwise by the inverse of the distribution function at a number in [0, 1) that
    depends on seed and place alone, so that batches, preemption and guesses change nothing.
    """
    for row, chooser in enumerate(choosers):
        if not chooser.is_plain:
            chooser.change(logits_NV[row])
    greedy = logits_NV.argmax(dim=-1)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.sampling.temperature != 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits_NV.device)
        greedy[rows] = _draw(logits_NV[rows], [choosers[row] for row in drawn], [places[row] for row in drawn])
    chosen: list[int] = greedy.tolist()
    return chosen


def logprobs(logits_NV: Tensor, tokens: list[int], counts: list[int]) -> list[Logprob]:
    """Of each row: the token's log-probability, and those of the ``counts`` likeliest."""
    logps_NV = logits_NV.float().log_softmax(dim=-1)
    own = logps_NV.gather(1, torch.tensor(tokens, device=logps_NV.device)[:, None])[:, 0].tolist()
    most = max(counts)
    if most == 0:
        return [Logprob(token, value) for token, value in zip(tokens, own, strict=True)]
    values, indices = logps_NV.topk(min(most, logps_NV.shape[1]), dim=-1)
    listed = zip(tokens, own, counts, indices.tolist(), values.tolist(), strict=True)
    return [Logprob(token, value, tuple(zip(ids[:count], top[:count], strict=True))) for token, value, count, ids, top in listed]


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) for each seed and place."""
    name = blake2b(struct.pack("<Qq", seed % 2**64, place), digest_size=8).digest()
    return float(int.from_bytes(name, "little") >> 11) * 2.0**-53


def _draw(logits_NV: Tensor, choosers: list[Chooser], places: list[int]) -> Tensor:
    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(chooser.sampling, name) for chooser in choosers], dtype=dtype, device=logits_NV.device)[:, None]

    cut = [bool(chooser.sampling.top_k) or chooser.sampling.top_p != 1 for chooser in choosers]
    if any(cut) and not all(cut):  # each row as if it were alone: the order in which tokens are cumulated is not the same
        drawn = torch.empty(len(choosers), dtype=torch.int64, device=logits_NV.device)
        for kind in (True, False):
            rows = [row for row, is_so in enumerate(cut) if is_so is kind]
            drawn[rows] = _draw(logits_NV[rows], [choosers[row] for row in rows], [places[row] for row in rows])
        return drawn
    scaled_NV = logits_NV / column("temperature")
    numbers = torch.tensor([uniform(chooser.seed, place) for chooser, place in zip(choosers, places, strict=True)], dtype=torch.float64)
    top_k, top_p, min_p = column("top_k", torch.int64), column("top_p"), column("min_p")
    if not any(cut):
        weights_NV = (scaled_NV - scaled_NV.amax(dim=-1, keepdim=True)).exp_()
        weights_NV.masked_fill_(weights_NV < min_p, 0)
        return _inverse(weights_NV, numbers)
    vocabulary = scaled_NV.shape[1]
    top_k = torch.where(top_k > 0, top_k, vocabulary)
    for width in (min(max(NUCLEUS, int(top_k[top_k < vocabulary].max()) if (top_k < vocabulary).any() else 0), vocabulary), vocabulary):
        values_NC, indices_NC = scaled_NV.topk(width, dim=-1)
        weights_NC = (values_NC - values_NC[:, :1]).exp_()
        weights_NC.masked_fill_(torch.arange(width, device=weights_NC.device) >= top_k, 0)
        # The share of top_p is of what top_k leaves; without top_k, of all tokens.
        all_N1 = (scaled_NV - values_NC[:, :1]).exp_().sum(dim=-1, keepdim=True)
        total_N1 = torch.where(top_k < vocabulary, weights_NC.sum(dim=-1, keepdim=True), all_N1)
        before_NC = weights_NC.cumsum(dim=-1) - weights_NC
        if width == vocabulary or bool(((top_k <= width) | (before_NC[:, -1:] >= top_p * total_N1)).all()):
            break
    weights_NC.masked_fill_(before_NC >= top_p * total_N1, 0)
    weights_NC[:, 0] = 1  # the likeliest token always stays
    weights_NC.masked_fill_(weights_NC < min_p, 0)
    return indices_NC.gather(1, _inverse(weights_NC, numbers)[:, None])[:, 0]


def _inverse(weights_NC: Tensor, numbers_N: Tensor) -> Tensor:
    """(N,) the first column whose cumulated weight is above the number's share of the whole."""
    sums_NC = weights_NC.double().cumsum(dim=-1)
    wanted_N1 = numbers_N.to(sums_NC.device)[:, None] * sums_NC[:, -1:]
    return torch.searchsorted(sums_NC, wanted_N1, right=True)[:, 0].clamp_max(weights_NC.shape[1] - 1)


def _ids(tokens: Any, like: Tensor) -> Tensor:
    return torch.tensor(sorted(tokens) if isinstance(tokens, (set, frozenset)) else list(tokens), dtype=torch.int64, device=like.device)
