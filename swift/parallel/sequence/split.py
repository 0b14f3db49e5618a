"""Which tokens of a batch each process of a sequence-parallel group computes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from swift.model.batch import Batch
from swift.model.layout import Layout
from swift.parallel.sequence.share import Share

# T tokens of the whole row with its filling, t = T / size of a process, n processes of a ring


@dataclass(frozen=True)
class PartLayout(Layout):
    """The layout of a whole row of which each process of ``share`` has a part. Attention sees the row, all else the part.

    ``num_filled`` tokens at the end make the row divisible; they are a segment of their own, which predicts nothing.
    """

    share: Share = None  # type: ignore[assignment]
    num_filled: int = 0

    @cached_property
    def blocks(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each process of the ring: runs (begin, end) of the row, ascending, T / n tokens together.

        A ring's row is cut into 2 n chunks. Each process has one with many keys to see and one with few: the one with most
        goes with the one with least, and so on. Of a single document these are chunks i and 2 n - 1 - i (zigzag).
        """
        count = self.share.ring_size
        if count == 1:
            return (((0, self.num_tokens),),)
        size = self.num_tokens // (2 * count)
        work = (self.depth_T + 1).view(2 * count, size).sum(dim=1).tolist()
        order = sorted(range(2 * count), key=lambda chunk: (work[chunk], chunk))
        pairs = sorted(tuple(sorted((order[index], order[-1 - index]))) for index in range(count))
        return tuple(tuple((chunk * size, (chunk + 1) * size) for chunk in pair) for pair in pairs)

    @cached_property
    def places(self) -> tuple[Tensor, ...]:
        """For each process of the group: (t,) the places of its tokens in the row, ascending."""
        inside = self.share.heads_size
        parts = [torch.cat([torch.arange(*run) for run in runs]).chunk(inside) for runs in self.blocks]
        return tuple(itertools.chain.from_iterable(parts))

    @property
    def own(self) -> Tensor:
        """(t,) the places of this process's tokens."""
        return self.places[self.share.rank]

    @cached_property
    def depth_T(self) -> Tensor:
        """(T,) how many tokens of its document stand before each token."""
        return super().position_ids()[0]

    @cached_property
    def plans(self) -> dict[Any, Any]:
        """What all layers of a pass ask a ring for, made when first needed; gone with the layout."""
        return {}

    def position_ids(self) -> Tensor:
        """(1, t) of this process's tokens."""
        return self.depth_T[self.own][None]

    def document_lengths(self) -> Tensor:
        """(t,) of this process's tokens."""
        return super().document_lengths()[self.own]


def split(batch: Batch, share: Share) -> Batch:
    """This process's part of ``batch``, which is the same in all of ``share``: a flat row (1, t).

    Rows with padding become one flat row of documents first. Filling makes the row divisible. A process none of whose
    tokens predicts anything gets one prediction of weight 0, so that it goes through the same exchanges as the others.
    The root of a layout is whole in every process: its tokens are computed by each.
    """
    batch = batch if batch.layout is not None else _flat(batch)
    assert batch.layout is not None
    layout = part_layout(batch.layout, share)
    own = layout.own.to(batch.input_ids.device)
    filled = torch.nn.functional.pad(batch.input_ids, (0, layout.num_filled))
    inverse = torch.full((layout.num_tokens,), -1, dtype=torch.int64, device=own.device)
    inverse[own] = torch.arange(len(own), device=own.device)
    return replace(
        batch,
        input_ids=filled[:, own],
        position_ids=layout.position_ids().to(own.device),
        layout=layout,
        num_tokens=batch.num_tokens // share.size + (share.rank < batch.num_tokens % share.size),
        **_predictions(batch, inverse),
    )


def part_layout(layout: Layout, share: Share) -> PartLayout:
    """``layout`` of a whole row, with filling, to be shared."""
    step = share.size if share.ring_size == 1 else 2 * share.size
    filled = -layout.num_tokens % step
    lengths, parents = layout.lengths, layout.parents
    if filled:
        lengths, parents = (*lengths, filled), (*parents, -1)
    return PartLayout(lengths, parents, layout.root, share=share, num_filled=filled)


def _predictions(batch: Batch, inverse: Tensor) -> dict[str, Any]:
    """The predictions at places of this process; ``inverse`` (T,) tells where in its part a place is, or -1."""
    place_K = inverse[batch.kept_K]
    is_own_K = place_K >= 0
    if not is_own_K.any():
        nothing = batch.kept_K.new_zeros(1)
        names = ("kept_K", "row_S", "target_S", "document_S")
        return {name: nothing for name in names} | {"weight_S": batch.weight_S.new_zeros(1)}
    is_own_S = is_own_K[batch.row_S]
    row_K = is_own_K.cumsum(0) - 1
    return {
        "kept_K": place_K[is_own_K],
        "row_S": row_K[batch.row_S[is_own_S]],
        **{name: getattr(batch, name)[is_own_S] for name in ("target_S", "weight_S", "document_S")},
    }


def _flat(batch: Batch) -> Batch:
    """Padded rows as one row of documents, without the padding."""
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    is_real = mask.flatten().bool()
    lengths: Sequence[int] = mask.sum(dim=1).tolist()
    place = is_real.cumsum(0) - 1
    changed: dict[str, Any] = {
        "input_ids": batch.input_ids.flatten()[is_real][None],
        "layout": Layout.of_documents([length for length in lengths if length]),
        "attention_mask": None,
        "kept_K": place[batch.kept_K],
    }
    return replace(batch, **changed)
