"""A vocabulary that several processes share: each has the logits of its own tokens, and the loss needs three numbers of a position.

The largest logit, the sum of exponentials and the logit that is right are found over the group; logits are never gathered
(Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from swift.model.collectives import Group, chunk_size

# C positions, S predictions


class VocabularyPart:
    """The rows of the head that this process has: ``size`` of ``total``, from ``first``; its layer's ``vocabulary_part``."""

    def __init__(self, total: int, group: Group) -> None:
        self.group, self.total = group, total
        self.largest = chunk_size(total, dist.get_world_size(group))
        """Rows of the process that has the most: what all must agree on is cut by it."""
        self.first = min(dist.get_rank(group) * self.largest, total)
        self.size = min(self.largest, total - self.first)
        self.is_gathered = True
        """Whether the layer gives all logits, of states of which it sums the gradient, or this part's and leaves that to the caller."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, the head's layer gives the logits of this part."""
        self.is_gathered = False
        try:
            yield
        finally:
            self.is_gathered = True

    def places(self, target_S: Tensor) -> tuple[Tensor, Tensor]:
        """(place of each target in this part, whether it is here); 0 for those that are not."""
        place_S = target_S - self.first
        is_here_S = (place_S >= 0) & (place_S < self.size)
        return place_S * is_here_S, is_here_S

    def largest_of(self, most_C: Tensor) -> Tensor:
        """The group's largest values."""
        most_C = most_C.contiguous()
        dist.all_reduce(most_C, op=dist.ReduceOp.MAX, group=self.group)
        return most_C

    def sums_of(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The group's sums of both, in one message."""
        both = torch.cat((first, second))
        dist.all_reduce(both, group=self.group)
        return both[: len(first)], both[len(first) :]

    def all_agree(self, fact: bool, device: torch.device) -> bool:
        """Whether ``fact`` holds in each process of the group."""
        return all_agree(fact, self.group, device)


def all_agree(fact: bool, group: Group, device: torch.device) -> bool:
    """Whether ``fact`` holds in each process of ``group``."""
    told = torch.tensor(int(fact), device=device, dtype=torch.int32)
    dist.all_reduce(told, op=dist.ReduceOp.MIN, group=group)
    return bool(told.item())


def vocabulary_part(layer: Any) -> VocabularyPart | None:
    """The part that ``layer``, a head, has of its vocabulary; None if it has the whole."""
    part = getattr(layer, "vocabulary_part", None)
    return part if isinstance(part, VocabularyPart) else None


def local(weight: Tensor) -> Tensor:
    """This process's part of ``weight``, as a tensor that gradients go through; ``weight`` itself if it is whole."""
    to_local = getattr(weight, "to_local", None)  # of a DTensor, whose package is not imported for a single process
    part: Tensor = weight if to_local is None else to_local()
    return part
