"""Keys and values in blocks, and attention over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from swift.engine.native.scheduler import Copy
from swift.model.attention import eager_attention

# T tokens of the row, S places of the cache, H query heads, G key heads, Q queries of a part, K keys, B sequences, d width of a head

MOST_GATHERED = 2**15  # tokens whose keys are gathered at once for sequences of one query each: some megabytes a layer
FEW = 8  # queries of a sequence that the compiled attention takes one by one


class PagedCache:
    """Keys and values of each layer, (S, G, d) with S = blocks times block size, made when a layer first shows its shape.

    The memory of a place is taken by the system when it is first written, so a large cache costs nothing until it is used.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The places of ``layer``, for keys and values (1, G, T, d) like these."""
        if layer not in self.layers:
            shapes = ((part.shape[1], part.shape[3]) for part in (key, value))
            self.layers[layer] = self._made(*shapes, like=key)
        return self.layers[layer]

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All places of ``layer``, of which ``places`` (T,) hold key and value (1, G, T, d) now."""
        keys, values = self.of(layer, key, value)
        keys.index_copy_(0, places, key[0].transpose(0, 1))
        values.index_copy_(0, places, value[0].transpose(0, 1))
        return keys, values

    def float32(self, layer: int, key: tuple[int, int], value: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The places of ``layer``, for keys and values of a token of these shapes (G, d), in float32."""
        if layer not in self.layers:
            self.layers[layer] = self._made(key, value, like=torch.empty(0))
        return self.layers[layer]

    def _made(self, key: tuple[int, int], value: tuple[int, int], *, like: Tensor) -> tuple[Tensor, Tensor]:
        count = self.num_blocks * self.block_size
        return like.new_empty(count, *key), like.new_empty(count, *value)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Beginnings of blocks into other blocks, in all layers."""
        size = self.block_size
        for pair in self.layers.values():
            for places in pair:
                for copy in copies:
                    source, target = copy.source * size, copy.target * size
                    places[target : target + copy.num_tokens] = places[source : source + copy.num_tokens]


class Attention(Protocol):
    """The attention of one pass, over a cache that it writes to."""

    cache: PagedCache
    written: Tensor
    """(T,) the places of the row's keys and values."""

    @property
    def whole_table(self) -> "Table | None":
        """For the compiled kernel, if it attends for all queries of the row in their order."""

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """(1, T, H, d) from query (1, H, T, d), key and value (1, G, T, d)."""
        ...


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens of one sequence in the row: ``begin`` in the row, ``length``; ``context`` tokens with themselves, in ``blocks``."""

    begin: int
    length: int
    context: int
    blocks: tuple[int, ...]


class Pages:
    """The attention of one pass: writes the row's keys and values to their places, then lets each token see its sequence.

    Passed to a model as ``attend``. The same for all layers, so that indices and masks are made once. ``kernel`` is the
    compiled attention in float32 for few queries of a sequence, which reads keys where they lie; without it they are gathered.
    """

    def __init__(self, cache: PagedCache, pieces: Sequence[Piece], device: torch.device, kernel: Any = None) -> None:
        self.cache = cache
        self.device = device
        self.kernel = kernel
        self.pieces = pieces
        few = 1 if kernel is None else FEW
        self.short = [piece for piece in pieces if piece.length <= few]
        self.longer = [piece for piece in pieces if piece.length > few]
        size = cache.block_size
        new = [piece.blocks[at // size] * size + at % size for piece in pieces for at in range(piece.context - piece.length, piece.context)]
        self.written = torch.tensor(new, device=device)
        self._groups: dict[int | None, list[_Group]] = {}
        self._masks: dict[Any, Tensor] = {}

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(1, T, H, d) from query (1, H, T, d), key and value (1, G, T, d)."""
        keys, values = self.cache.write(module.layer_idx, self.written, key, value)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        extra = softcap, s_aux
        for piece in self.longer:
            row = slice(piece.begin, piece.begin + piece.length)
            if piece.length == piece.context:
                k, v = key[:, :, row], value[:, :, row]
            else:
                places = self._longer_places(piece)
                k, v = (part.index_select(0, places).transpose(0, 1)[None] for part in (keys, values))
            mask = self._mask(piece.length, piece.context, sliding_window)
            output[row] = attend(query[:, :, row], k, v, mask, scaling, *extra)[0].transpose(0, 1)
        if self.kernel is not None:
            if self.short:
                self._in_place(query, keys, values, scaling, sliding_window, softcap, s_aux, output)
            return output[None]
        for group in self._grouped(sliding_window):
            q = query[0, :, group.rows].transpose(0, 1).unsqueeze(2)  # (B, H, 1, d)
            k, v = (part.index_select(0, group.places).unflatten(0, group.shape).transpose(1, 2) for part in (keys, values))
            output[group.rows] = attend(q, k, v, group.mask, scaling, *extra)[:, :, 0]
        return output[None]

    def _in_place(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        output: Tensor,
    ) -> None:
        """The rows of ``output`` (T, H, d) that belong to short pieces, by the compiled kernel."""
        table = self.table
        own = query[0].transpose(0, 1) if table.rows is None else query[0].index_select(1, table.rows).transpose(0, 1)
        if own.stride(2) != 1:
            own = own.contiguous()
        target = output if table.rows is None else output.new_empty(own.shape[0], output.shape[1], output.shape[2])
        sinks = None if sinks is None else sinks.float().contiguous()
        first = table.first(sliding_window)  # what the kernel reads must live until it has
        self.kernel(
            own.data_ptr(),
            own.stride(0),
            own.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            table.blocks.data_ptr(),
            table.blocks.shape[1],
            first.data_ptr(),
            table.context.data_ptr(),
            own.shape[0],
            own.shape[1],
            keys.shape[1],
            keys.shape[2],
            values.shape[2],
            self.cache.block_size,
            scaling,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            target.data_ptr(),
        )
        if table.rows is not None:
            output.index_copy_(0, table.rows, target)

    @cached_property
    def table(self) -> "Table":
        """The queries of short pieces, for the compiled kernel."""
        width = max(len(piece.blocks) for piece in self.short)
        blocks = [[*piece.blocks, *[0] * (width - len(piece.blocks))] for piece in self.short for _ in range(piece.length)]
        context = [at for piece in self.short for at in range(piece.context - piece.length + 1, piece.context + 1)]
        rows = None
        if self.longer:
            rows = torch.tensor([piece.begin + turn for piece in self.short for turn in range(piece.length)])
        return Table(rows, torch.tensor(blocks, dtype=torch.int32), torch.tensor(context, dtype=torch.int32))

    @property
    def whole_table(self) -> "Table | None":
        """See Attention."""
        return None if self.longer else self.table

    def _longer_places(self, piece: Piece) -> Tensor:
        return _places(piece.blocks, self.cache.block_size, piece.context).to(self.device)

    def _mask(self, num_queries: int, num_keys: int, sliding_window: int | None) -> Tensor | None:
        """(1, 1, Q, K) bool, the last query sees the last key; None if it is the kernels' own."""
        if num_queries == num_keys and (sliding_window is None or num_keys <= sliding_window):
            return None
        name = num_queries, num_keys, sliding_window
        if name not in self._masks:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=self.device).tril(num_keys - num_queries)
            if sliding_window is not None:
                mask = mask.triu(num_keys - num_queries - sliding_window + 1)
            self._masks[name] = mask[None, None]
        return self._masks[name]

    def _grouped(self, sliding_window: int | None) -> list["_Group"]:
        if sliding_window not in self._groups:
            places = {piece: _places(piece.blocks, self.cache.block_size, piece.context) for piece in self.short}
            self._groups[sliding_window] = _group(self.short, places, sliding_window, self.device)
        return self._groups[sliding_window]


@dataclass(frozen=True)
class Table:
    """Queries for the compiled kernel, int32: ``rows`` in the row (None: all, in order), blocks (B, most), tokens that each sees (B,)."""

    rows: Tensor | None
    blocks: Tensor
    context: Tensor

    def first(self, sliding_window: int | None) -> Tensor:
        """(B,) first tokens that are seen."""
        if sliding_window is None:
            return torch.zeros_like(self.context)
        return (self.context - sliding_window).clamp_(min=0)


@dataclass(frozen=True)
class _Group:
    """Sequences of one query each, of similar length, whose keys are gathered in one call."""

    rows: Any  # places in the row: a slice if they follow one another
    places: Tensor  # (B * K,) of the cache
    shape: tuple[int, int]  # B, K
    mask: Tensor | None  # (B, 1, 1, K) bool

    @cached_property
    def num_keys(self) -> int:
        return self.shape[1]


def _group(pieces: Sequence[Piece], places: dict[Piece, Tensor], sliding_window: int | None, device: torch.device) -> list[_Group]:
    seen = {piece: piece.context if sliding_window is None else min(piece.context, sliding_window) for piece in pieces}
    groups: list[_Group] = []
    members: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (seen[piece], piece.begin)):
        widest = seen[piece]
        if members and ((len(members) + 1) * widest > MOST_GATHERED or widest > 2 * seen[members[0]] + 64):
            groups.append(_made(members, seen, places, device))
            members = []
        members.append(piece)
    if members:
        groups.append(_made(members, seen, places, device))
    return groups


def _made(pieces: list[Piece], seen: dict[Piece, int], places: dict[Piece, Tensor], device: torch.device) -> _Group:
    width = max(seen[piece] for piece in pieces)
    pieces = sorted(pieces, key=lambda piece: piece.begin)
    table = torch.zeros(len(pieces), width, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        mine = places[piece][piece.context - seen[piece] :]
        table[row, : seen[piece]] = mine
        table[row, seen[piece] :] = mine[0]  # masked, but what was never written may be no number, and zero times that is none
    lengths = torch.tensor([seen[piece] for piece in pieces])
    mask = None
    if int(lengths.min()) < width:
        mask = (torch.arange(width) < lengths[:, None])[:, None, None].to(device)
    first, last = pieces[0].begin, pieces[-1].begin
    rows: Any = slice(first, last + 1)
    if last - first + 1 != len(pieces):
        rows = torch.tensor([piece.begin for piece in pieces], device=device)
    return _Group(rows, table.flatten().to(device), (len(pieces), width), mask)


def _places(blocks: tuple[int, ...], size: int, count: int) -> Tensor:
    """(count,) places of a sequence's first tokens."""
    return (torch.tensor(blocks)[:, None] * size + torch.arange(size)).flatten()[:count]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, s_aux: Tensor | None
) -> Tensor:
    """(B, H, Q, d) from query (B, H, Q, d), key and value (B, G, K, d). Without a mask the kernels' own causal one."""
    num_queries, num_keys, groups = query.shape[2], key.shape[2], key.shape[1]
    if softcap is not None or s_aux is not None:
        if mask is None:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        return eager_attention(query, key, value, mask, scaling, 0.0, softcap, s_aux).contiguous()
    if num_queries == 1:  # the heads that read the same keys are queries of one head
        folded = query.unflatten(1, (groups, -1))[:, :, :, 0]
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        return out.flatten(1, 2).unsqueeze(2)
    # Key heads as a batch, whose keys all their query heads read without a copy.
    shape = query.shape
    q = query.unflatten(1, (groups, -1)).flatten(0, 1)
    k, v = (part.flatten(0, 1).unsqueeze(1).expand(-1, shape[1] // groups, -1, -1) for part in (key, value))
    mask = None if mask is None else mask[0, 0]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    whole: Tensor = out.unflatten(0, (shape[0], groups)).flatten(1, 2)
    return whole
