"""Direct preference optimisation: a policy learns from pairs of a better and a worse answer, without a model of rewards.

r(y) = log p(y) - log p_ref(y) is the log-ratio of an answer; beta r is its implicit reward (Rafailov et al. 2023,
arXiv:2305.18290). The losses are functions of the log-ratios of both answers of P pairs, (P,) each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from swift.objectives.base import Batch, Policy, Reference


@dataclass(frozen=True)
class Pairs:
    """P pairs as the losses see them, each (P,) float32."""

    chosen: Tensor  # log-ratios of the chosen answers
    rejected: Tensor
    chosen_length: Tensor  # trained tokens of the chosen answers
    rejected_length: Tensor
    nll: Tensor  # -log p of a token of the chosen answers, their mean

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Settings:
    """Numbers of the losses; ``smoothing`` is the share of pairs that are thought to be the wrong way round."""

    beta: float
    smoothing: float
    tau: float  # of discopop


def sigmoid(pairs: Pairs, given: Settings) -> Tensor:
    """-log sigmoid(beta margin), arXiv:2305.18290 eq. 7; smoothed as in cDPO (Mitchell 2023), its cross-entropy with 1 - smoothing."""
    margin = given.beta * pairs.margin
    return -(1 - given.smoothing) * logsigmoid(margin) - given.smoothing * logsigmoid(-margin)


def robust(pairs: Pairs, given: Settings) -> Tensor:
    """The loss whose mean over flipped labels is that of right ones: Chowdhury et al. 2024, arXiv:2403.00409."""
    margin = given.beta * pairs.margin
    smoothed = -(1 - given.smoothing) * logsigmoid(margin) + given.smoothing * logsigmoid(-margin)
    return smoothed / (1 - 2 * given.smoothing)


def hinge(pairs: Pairs, given: Settings) -> Tensor:
    """max(0, 1 - beta margin): the loss of SLiC (Zhao et al. 2023, arXiv:2305.10425) on implicit rewards."""
    return torch.relu(1 - given.beta * pairs.margin)


def ipo(pairs: Pairs, given: Settings) -> Tensor:
    """(margin - 1 / (2 beta))^2 of log-ratios that are means over tokens: Azar et al. 2023, arXiv:2310.12036, eq. 17."""
    margin = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
    return (margin - 1 / (2 * given.beta)) ** 2


def exo_pair(pairs: Pairs, given: Settings) -> Tensor:
    """KL(policy || smoothed preference) over the two answers: Ji et al. 2024, arXiv:2402.00856, eq. 16."""
    margin = given.beta * pairs.margin
    chosen, rejected = logsigmoid(margin), logsigmoid(-margin)
    target = torch.tensor([1 - given.smoothing, given.smoothing], dtype=torch.float64).log().tolist()
    loss: Tensor = chosen.exp() * (chosen - target[0]) + rejected.exp() * (rejected - target[1])
    return loss


def nca_pair(pairs: Pairs, given: Settings) -> Tensor:
    """Noise-contrastive alignment of two answers, their rewards seen by themselves: Chen et al. 2024, arXiv:2402.05369."""
    chosen, rejected = given.beta * pairs.chosen, given.beta * pairs.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, given: Settings) -> Tensor:
    """Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with the chosen answer sure to win."""
    return (pairs.chosen - 0.5 / given.beta) ** 2 + (pairs.rejected + 0.5 / given.beta) ** 2


def apo_zero(pairs: Pairs, given: Settings) -> Tensor:
    """D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7: chosen answers are better than the model's own."""
    return 1 - torch.sigmoid(given.beta * pairs.chosen) + torch.sigmoid(given.beta * pairs.rejected)


def apo_down(pairs: Pairs, given: Settings) -> Tensor:
    """The same, eq. 8: chosen answers are worse than the model's own."""
    return torch.sigmoid(given.beta * pairs.chosen) + 1 - torch.sigmoid(given.beta * pairs.margin)


def discopop(pairs: Pairs, given: Settings) -> Tensor:
    """The logistic and the exponential loss, mixed by the margin: Lu et al. 2024, arXiv:2406.08414, eq. 5."""
    margin = given.beta * pairs.margin
    share = torch.sigmoid(margin / given.tau)
    return -logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


def sft(pairs: Pairs, given: Settings) -> Tensor:
    """Cross-entropy of the chosen answer, its mean over tokens: a part of MPO (Wang et al. 2024, arXiv:2411.10442)."""
    return pairs.nll


LOSSES: dict[str, Callable[[Pairs, Settings], Tensor]] = {
    function.__name__: function
    for function in (sigmoid, hinge, ipo, robust, exo_pair, nca_pair, sppo_hard, apo_zero, apo_down, discopop, sft)
}


class Dpo:
    """A weighted sum of losses of pairs, and ``rpo_alpha`` times the mean cross-entropy of a chosen answer's tokens.

    The latter is the term of Pang et al. 2024, arXiv:2404.19733, eq. 1. ``reference_free``: p_ref is the same for all answers.
    """

    layout = "preference"
    items = "pairs"

    def __init__(
        self,
        *,
        loss_type: Sequence[str] = ("sigmoid",),
        loss_weights: Sequence[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        rpo_alpha: float | None = None,
        reference_free: bool = False,
    ) -> None:
        self.losses = list(zip((LOSSES[name] for name in loss_type), loss_weights or [1.0] * len(loss_type), strict=True))
        self.settings, self.rpo_alpha = Settings(beta, label_smoothing, discopop_tau), rpo_alpha
        self.needs_reference = not reference_free
        self.has_nll = rpo_alpha is not None or "sft" in loss_type

    def count(self, batch: Batch) -> float:
        """The number of pairs."""
        return float(_counted(_lengths(batch)).sum())

    def loss_sum(self, policy: Policy, reference: Reference | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the pairs of the loss (float32 scalar) and of what is logged of them.

        The reference comes first: its weights are the policy's own if it is the policy without its adapter.
        """
        with torch.no_grad():
            before = self._before(reference, batch)
        logps = policy.logps(batch)
        ratios, lengths = logps - before.to(logps), _lengths(batch)
        is_counted = _counted(lengths)
        one = lengths.clamp_min(1)
        pairs = Pairs(ratios[0::2], ratios[1::2], one[0::2], one[1::2], nll=-logps[0::2] / one[0::2])
        loss = sum((weight * function(pairs, self.settings) for function, weight in self.losses), torch.zeros_like(pairs.nll))
        if self.rpo_alpha is not None:
            loss = loss + self.rpo_alpha * pairs.nll
        chosen, rejected = (self.settings.beta * side.detach() for side in (pairs.chosen, pairs.rejected))
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[0::2].detach(),
            "logps/rejected": logps[1::2].detach(),
        }
        if self.has_nll:
            values["nll_loss"] = pairs.nll.detach()
        return (loss * is_counted).sum(), {name: (value * is_counted).sum() for name, value in values.items()}

    def _before(self, reference: Reference | None, batch: Batch) -> Tensor:
        """(num_documents,) log-probabilities that the reference gives, now or before."""
        if not self.needs_reference:
            return torch.zeros(batch.num_documents, device=batch.weight_S.device)
        if batch.reference_logps is not None:
            return batch.reference_logps
        assert reference is not None
        return reference.logps(batch)


def _lengths(batch: Batch) -> Tensor:
    """(num_documents,) float32: predictions of each document that have a weight."""
    is_trained = (batch.weight_S != 0).float()
    return is_trained.new_zeros(batch.num_documents).index_add(0, batch.document_S, is_trained)


def _counted(lengths: Tensor) -> Tensor:
    """(P,) 1 for pairs of which both answers are trained; a batch that only fills a gap has none."""
    return ((lengths[0::2] > 0) & (lengths[1::2] > 0)).float()
