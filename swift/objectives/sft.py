"""Next-token cross-entropy of the supervised tokens."""

from torch import Tensor

from swift.objectives.base import Batch, Policy, Reference


class Sft:
    """Cross-entropy of each supervised token, times its weight."""

    layout = "sft"
    needs_reference = False
    items = "supervised_tokens"

    def count(self, batch: Batch) -> float:
        """Supervised tokens; tokens of weight 0 are none, other weights scale the loss but not the count."""
        return float((batch.weight_S != 0).sum())

    def loss_sum(self, policy: Policy, reference: Reference | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss (float32 scalar) and the number of tokens whose likeliest prediction is right."""
        loss, right = policy.cross_entropy(batch)
        return loss, {"token_acc": right}
