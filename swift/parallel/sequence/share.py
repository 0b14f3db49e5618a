"""Who shares a sequence, and by which way: heads against tokens (Ulysses), keys round a ring, or the one inside of the other."""

import math
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from swift.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """The processes that share a sequence, and this one's place among them: ``ring_rank * heads_size + heads_rank``.

    Processes of ``heads`` (neighbours) exchange heads for tokens; those of ``ring`` pass their keys round. Each is None if
    it is this process alone.
    """

    group: Any
    heads: Any = None
    ring: Any = None

    @property
    def size(self) -> int:
        return self.group.size()  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        return self.group.rank()  # type: ignore[no-any-return]

    @property
    def heads_size(self) -> int:
        return 1 if self.heads is None else self.heads.size()

    @property
    def heads_rank(self) -> int:
        return 0 if self.heads is None else self.heads.rank()

    @property
    def ring_size(self) -> int:
        return 1 if self.ring is None else self.ring.size()

    @property
    def ring_rank(self) -> int:
        return 0 if self.ring is None else self.ring.rank()

    def __str__(self) -> str:
        named = (("ulysses", self.heads_size), ("ring", self.ring_size))
        return " x ".join(f"{name} {size}" for name, size in named if size > 1) or "alone"


def make_share(config: Any, group: Any, kind: str | None = None, *, tp: int = 1) -> Share:
    """How the processes of ``group`` share sequences of a model with ``config``. Called in all of them at once.

    ``kind`` ulysses: all exchange heads, of which each of ``tp`` processes that share a layer has a part; ConfigError if
    these do not divide. ring: all pass keys round. None: as many exchange heads as divide them, and the rest is a ring.
    """
    size = group.size()
    heads = config.get_text_config().num_attention_heads
    counts = heads if isinstance(heads, (list, tuple)) else [heads]
    fits = math.gcd(size, *(count // tp for count in counts))
    if kind == "ulysses" and fits != size:
        each = f" over --tensor_model_parallel_size {tp}" if tp > 1 else ""
        raise ConfigError(
            f"--sequence_parallel_size {size} does not divide the {' or '.join(map(str, counts))} attention heads{each}",
            hint="use --sequence_parallel_kind ring, or leave it away",
        )
    inside = 1 if kind == "ring" else fits
    if inside == size:
        return Share(group, heads=group)
    if inside == 1:
        return Share(group, ring=group)
    ranks = dist.get_process_group_ranks(group)
    ring_rank, heads_rank = divmod(group.rank(), inside)
    return Share(
        group,
        heads=_subgroup(ranks[ring_rank * inside : (ring_rank + 1) * inside]),
        ring=_subgroup(ranks[heads_rank::inside]),
    )


def _subgroup(ranks: list[int]) -> Any:
    """A group of its members alone: the others need not know of it."""
    return dist.new_group(ranks, use_local_synchronization=True)
