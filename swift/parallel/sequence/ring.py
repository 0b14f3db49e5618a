"""Keys and values go round a ring of processes; each adds what its own queries see of them (Liu et al. 2023, arXiv:2310.01889).

Of all queries the largest score, the sum of the powers and the weighted values are kept up to date from piece to piece
(online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867). Between the passes each process keeps its own query, key,
value and output, and the logarithm of the sum: memory falls with the number of processes. The scores of one piece stand
in memory at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swift.parallel.sequence.exchange import Passing
from swift.parallel.sequence.split import PartLayout
from swift.parallel.sequence.tiles import ROOT, Tile, tiles

# H query heads, G key heads, R = H / G, t tokens of a process, n processes of the ring, P tokens of the root, d width of a head

LOWEST = -1e30  # a largest score before any key; not infinite, lest differences of it are no numbers


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PartLayout,
    *,
    root: tuple[Tensor, Tensor] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """(1, t, H, d) from query (1, H, t, d) and key and value (1, G, t, d) of this process's part, as in ``packed_attention``.

    ``root``: key and value (1, G, P, d) of the layout's root, whole in each process. A process sends 2 (n - 1) t G d
    elements forward and twice as many backward (keys and values again, and their gradients).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    roots = root if root is not None else (None, None)
    output: Tensor = _Ring.apply(query, key, value, *roots, s_aux, layout, scaling, sliding_window, softcap)
    return output


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        root_key: Tensor | None,
        root_value: Tensor | None,
        sinks: Tensor | None,
        layout: PartLayout,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ctx.layout, ctx.window, ctx.scores = layout, window, (scaling, softcap)
        queries = query[0].unflatten(0, (key.shape[1], -1))  # (G, R, t, d)
        wide = torch.promote_types(query.dtype, torch.float32)
        most = query.new_full(queries.shape[:3], LOWEST, dtype=wide)
        total = torch.zeros_like(most)
        if sinks is not None:
            most = sinks.to(wide).view(*queries.shape[:2], 1).expand_as(most).clone()
            total = torch.ones_like(most)
        output = query.new_zeros(*queries.shape[:3], value.shape[-1], dtype=wide)
        for owner, keys, values in _blocks(layout, key, value, root_key, root_value):
            for tile in tiles(layout, owner, window):
                place = (slice(None), slice(None), tile.queries.place)
                scores = _scores(queries, keys, tile, *ctx.scores)[0]
                higher = torch.maximum(most[place], scores.amax(dim=-1))
                shrink = (most[place] - higher).exp()
                powers = scores.sub_(higher[..., None]).exp_()
                most[place] = higher
                total[place] = total[place] * shrink + powers.sum(dim=-1)
                part = _product(powers.to(values.dtype).flatten(1, 2), values[:, tile.keys.place])
                output[place] = output[place] * shrink[..., None] + part.view(*powers.shape[:3], -1)
        output = (output / total[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, root_key, root_value, sinks, output, most + total.log())
        return output.flatten(0, 1).transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, root_key, root_value, sinks, output, sums = ctx.saved_tensors
        queries = query[0].unflatten(0, (key.shape[1], -1))
        grads = grad[0].transpose(0, 1).unflatten(0, (key.shape[1], -1))  # (G, R, t, d)
        delta = (grads.to(sums.dtype) * output).sum(dim=-1)
        dquery = torch.zeros_like(queries, dtype=sums.dtype)
        droot: Tensor | None = None
        own: Tensor | None = None
        home = _Home(ctx.layout)
        for owner, keys, values in _blocks(ctx.layout, key, value, root_key, root_value):
            # Gradients of keys and values side by side, as they travel.
            dkeys = keys.new_zeros(*keys.shape[:2], keys.shape[2] + values.shape[2], dtype=sums.dtype)
            for tile in tiles(ctx.layout, owner, ctx.window):
                _tile_backward(tile, queries, keys, values, grads, sums, delta, dquery, dkeys, ctx.scores)
            if owner == ROOT:
                droot = dkeys
            elif own is None:
                own = dkeys  # the ring begins at home
            else:
                home.send_on(dkeys)
        assert own is not None
        own = home.receive(own)
        dkey, dvalue = own.to(key.dtype).split([key.shape[-1], value.shape[-1]], dim=-1)
        droots = (None, None) if droot is None else droot.to(key.dtype).split([key.shape[-1], value.shape[-1]], dim=-1)
        droots = tuple(None if part is None else part[None] for part in droots)
        dsinks = None
        if sinks is not None:
            powers = (sinks.to(sums.dtype).view(*queries.shape[:2], 1) - sums).exp()
            dsinks = -(powers * delta).sum(dim=-1).flatten().to(sinks.dtype).view_as(sinks)
        whole = dquery.flatten(0, 1)[None].to(query.dtype)
        return whole, dkey[None], dvalue[None], *droots, dsinks, None, None, None, None


class _Home:
    """Gradients of keys and values on the way to the process that the keys are of, growing as they go."""

    def __init__(self, layout: PartLayout) -> None:
        self.ring = layout.share.ring
        self._passing: Passing | None = None

    def send_on(self, gradient: Tensor) -> None:
        """Add what the previous process sent, of the same keys, and send it on."""
        if self._passing is not None:
            gradient += self._passing.arrived()
        self._passing = Passing(gradient, self.ring)

    def receive(self, gradient: Tensor) -> Tensor:
        """``gradient`` of this process's own keys, with that of all others."""
        return gradient if self._passing is None else gradient + self._passing.arrived()


def _blocks(
    layout: PartLayout, key: Tensor, value: Tensor, root_key: Tensor | None, root_value: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(owner, keys (G, t, d), values (G, t, d)): the root's if there is one, this process's own, then the others' as they come.

    The next ones are on their way while these are used.
    """
    if root_key is not None and root_value is not None:
        yield ROOT, root_key[0], root_value[0]
    ring, size, rank = layout.share.ring, layout.share.ring_size, layout.share.ring_rank
    both = torch.cat([key[0], value[0]], dim=-1)
    for step in range(size):
        passing = Passing(both, ring) if step < size - 1 else None
        yield (rank - step) % size, both[..., : key.shape[-1]], both[..., key.shape[-1] :]
        if passing is not None:
            both = passing.arrived()


def _scores(queries: Tensor, keys: Tensor, tile: Tile, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """(G, R, queries, keys) scores of a piece, -inf where hidden, and their derivative by the products if that is not constant."""
    q = queries[:, :, tile.queries.place]
    scores = _product(q.flatten(1, 2), keys[:, tile.keys.place].transpose(1, 2)).view(*q.shape[:3], -1) * scaling
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent**2
    mask = tile.mask(queries.device)
    return (scores if mask is None else scores.masked_fill_(~mask, -torch.inf)), slope


def _tile_backward(
    tile: Tile,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    grads: Tensor,
    sums: Tensor,
    delta: Tensor,
    dquery: Tensor,
    dkeys: Tensor,
    options: tuple[float, float | None],
) -> None:
    """Add a piece's gradients to ``dquery`` (G, R, t, d) and ``dkeys`` (G, t, 2 d)."""
    place, at = (slice(None), slice(None), tile.queries.place), tile.keys.place
    scores, slope = _scores(queries, keys, tile, *options)
    powers = scores.sub_(sums[place][..., None]).exp_()
    grad = grads[place].flatten(1, 2)
    width = keys.shape[-1]
    dkeys[:, at, width:] += _product(powers.to(grad.dtype).flatten(1, 2).transpose(1, 2), grad)
    dpowers = _product(grad, values[:, at].transpose(1, 2)).view_as(powers)
    dscores = powers.mul_(dpowers - delta[place][..., None])
    if slope is not None:
        dscores.mul_(slope)
    dproducts = dscores.mul_(options[0]).to(queries.dtype).flatten(1, 2)
    dquery[place] += _product(dproducts, keys[:, at]).view(*dscores.shape[:3], -1)
    dkeys[:, at, :width] += _product(dproducts.transpose(1, 2), queries[place].flatten(1, 2))


def _product(first: Tensor, second: Tensor) -> Tensor:
    """The products of two batches of matrices, in float32 at least: rounded to bfloat16, a score of 20 is off by up to 6 %."""
    if first.dtype not in (torch.bfloat16, torch.float16):
        return first @ second
    if first.device.type == "cuda":
        return torch.bmm(first, second, out_dtype=torch.float32)
    return first.float() @ second.float()
