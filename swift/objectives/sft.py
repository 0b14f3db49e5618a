"""Next-token cross-entropy at the supervised positions."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swift.objectives.base import Batch

IGNORE = -100

# B batch, T tokens, K kept positions, S supervised tokens, V vocabulary


class Sft:
    """Cross-entropy of each supervised token, times its weight if the batch has ``weights``."""

    layout = "sft"
    needs_reference = False

    def count(self, batch: Batch) -> float:
        """Supervised tokens; tokens of weight 0 are none, other weights scale the loss but not the count."""
        is_supervised = batch["labels"][:, 1:] != IGNORE
        if "weights" in batch:
            is_supervised = is_supervised & (batch["weights"][:, 1:] != 0)
        return float(is_supervised.sum())

    def loss_sum(self, policy: Any, reference: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss (float32 scalar) and the number of tokens whose likeliest prediction is right."""
        targets_BT = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        kept_K = (targets_BT != IGNORE).any(dim=0).nonzero().squeeze(1)
        logits_BKV = _logits_at(policy, batch, kept_K)
        targets_BK = targets_BT[:, kept_K]
        is_supervised_BK = targets_BK != IGNORE
        logits_SV = logits_BKV[is_supervised_BK].float()
        targets_S = targets_BK[is_supervised_BK]
        loss_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
        is_counted_S = torch.ones_like(targets_S, dtype=torch.bool)
        if "weights" in batch:
            weights_BT = F.pad(batch["weights"][:, 1:], (0, 1))
            weights_S = weights_BT[:, kept_K][is_supervised_BK]
            loss_S = loss_S * weights_S
            is_counted_S = weights_S != 0
        is_right_S = (logits_SV.detach().argmax(dim=-1) == targets_S) & is_counted_S
        return loss_S.sum(), {"token_acc": is_right_S.sum()}


def _logits_at(policy: Any, batch: Batch, positions_K: Tensor) -> Tensor:
    """Logits (B, K, V) at some positions. The head is run only there if the model can, which saves its largest tensor."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    if takes_logits_to_keep(policy):
        kept: Tensor = policy(**inputs, logits_to_keep=positions_K).logits
        return kept
    every: Tensor = policy(**inputs).logits
    return every[:, positions_K]


def takes_logits_to_keep(policy: Any) -> bool:
    """Whether the model's forward knows ``logits_to_keep`` (nearly all causal models of transformers do)."""
    inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
