"""Heads against tokens (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509): before attention each process of u gives away
its tokens of the other processes' heads, and gets the others' tokens of its own heads."""

import math
from typing import Any

import torch
from torch import Tensor

from swift.errors import ConfigError
from swift.parallel.sequence.exchange import Transpose

# H query heads, G key heads, t tokens of a process, u processes, d width of a head


def to_heads(query: Tensor, key: Tensor, value: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(1, H / u, u t, d) and (1, G' / u, u t, d) of (1, H, t, d) and (1, G, t, d), in one exchange.

    Key heads that do not divide are repeated, to G' = lcm(G, u). A process sends (u - 1) t (H d + 2 G' d) / u elements
    forward, and as many backward. ConfigError if the query heads do not divide.
    """
    size = group.size()
    if query.shape[1] % size:
        raise ConfigError(
            f"{size} processes of --sequence_parallel_size cannot share {query.shape[1]} attention heads",
            hint="use --sequence_parallel_kind ring",
        )
    parts = [query, *(repeated(part, size) for part in (key, value))]
    rows = [part[0].reshape(size, -1) for part in parts]
    received = Transpose.apply(torch.cat(rows, dim=1), group)
    found = []
    for part, row in zip(parts, received.split([row.shape[1] for row in rows], dim=1), strict=True):
        _, heads, tokens, width = part.shape
        shared = row.view(size, heads // size, tokens, width).transpose(0, 1)
        found.append(shared.reshape(1, heads // size, size * tokens, width))
    return found[0], found[1], found[2]


def to_tokens(output: Tensor, group: Any) -> Tensor:
    """(1, t, H, d) of (1, u t, H / u, d): the way back. A process sends (u - 1) t H d / u elements, and as many backward."""
    size = group.size()
    _, tokens, heads, width = output.shape
    received = Transpose.apply(output[0].reshape(size, -1), group)
    whole: Tensor = received.view(size, tokens // size, heads, width).transpose(0, 1)
    return whole.reshape(1, tokens // size, size * heads, width)


def repeated(part: Tensor, size: int) -> Tensor:
    """Key or value heads (1, G, ...), each as often as makes their number a multiple of ``size``."""
    heads = part.shape[1]
    times = math.lcm(heads, size) // heads
    return part.repeat_interleave(times, dim=1) if times > 1 else part


def own_heads(part: Tensor, group: Any, dim: int = 1) -> Tensor:
    """This process's heads of a tensor that has all of them along ``dim``."""
    count = part.shape[dim] // group.size()
    return part.narrow(dim, group.rank() * count, count)
