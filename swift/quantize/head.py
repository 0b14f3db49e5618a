"""What was lost, from the hidden states of the last block: the vocabulary in parts, so that no row of logits is ever whole."""

import torch
from torch import Tensor

from swift.quantize.measure import Measured
from swift.quantize.skeleton import Skeleton
from swift.quantize.store import Store

# T tokens of a piece, D model width, v tokens of a part of the vocabulary

PART = 2**13  # tokens of the vocabulary at once


class _Softmax:
    """Sums of exp over a row of logits that comes in parts; the largest is subtracted, as it grows."""

    def __init__(self, places: int) -> None:
        self.largest = torch.full((places,), -torch.inf)
        self.total = torch.zeros(places)
        self.weighted = torch.zeros(places)
        self.likeliest = torch.zeros(places, dtype=torch.long)
        self.target = torch.zeros(places)

    def add(self, logits: Tensor, gap: Tensor | None, begin: int, targets: Tensor) -> None:
        """``logits`` (T, v) of the tokens from ``begin``; ``gap`` (T, v) is what is averaged; ``targets`` (T,) are token ids."""
        high, where = logits.max(1)
        grows = high > self.largest
        self.likeliest = torch.where(grows, where + begin, self.likeliest)
        largest = torch.maximum(self.largest, high)
        shrink = (self.largest - largest).exp()
        share = (logits - largest[:, None]).exp_()
        self.total = self.total * shrink + share.sum(1)
        if gap is not None:
            self.weighted = self.weighted * shrink + share.mul_(gap).sum(1)
        self.largest = largest
        inside = (targets >= begin) & (targets < begin + logits.shape[1])
        self.target[inside] = logits[inside].gather(1, targets[inside, None] - begin)[:, 0]

    def log_total(self) -> Tensor:
        """(T,): log of the sum of exp."""
        return self.largest + self.total.log()


@torch.inference_mode()
def measure(skeleton: Skeleton, pieces: list[list[int]], wanted: Store, found: Store) -> Measured:
    """Divergence and perplexities of ``found`` beside ``wanted``: hidden states (1, T, D) of the last block for each piece."""
    original = [_Softmax(len(piece)) for piece in pieces]
    quantized = [_Softmax(len(piece)) for piece in pieces]
    targets = [torch.tensor([*piece[1:], -1]) for piece in pieces]
    count = skeleton.vocabulary
    for begin in range(0, count, PART):
        rows = slice(begin, min(count, begin + PART))
        with skeleton.head(rows) as logits:
            for index, target in enumerate(targets):
                both = [logits(store.read(index))[0, : len(target)].cpu() for store in (wanted, found)]  # without padding
                original[index].add(both[0], both[0] - both[1], begin, target)
                quantized[index].add(both[1], None, begin, target)
    places = sum(map(len, pieces))
    kl = sum(
        float((own.weighted / own.total - own.log_total() + other.log_total()).sum())
        for own, other in zip(original, quantized, strict=True)
    )
    same = sum(int((own.likeliest == other.likeliest).sum()) for own, other in zip(original, quantized, strict=True))
    before, after = (_perplexity(rows) for rows in (original, quantized))
    return Measured("the quantizer's own passes", places, kl / places, before, after, same / places)


def _perplexity(rows: list[_Softmax]) -> float:
    total = sum(float((row.log_total() - row.target)[:-1].double().sum()) for row in rows)
    return float(torch.tensor(total / sum(len(row.target) - 1 for row in rows)).exp())
