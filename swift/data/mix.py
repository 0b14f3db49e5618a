"""Interleaving: which data set gives the next row, by chance, and when to stop."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from swift.config.data import STOPPING_STRATEGIES
from swift.errors import ConfigError

_DRAWS = 1 << 16


def check_mixture(probabilities: Sequence[float] | None, stopping_strategy: str, num_datasets: int) -> None:
    """ConfigError unless the strategy is known and there is one probability more than 0 a data set, which sum to 1."""
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ConfigError(f"unknown stopping_strategy {stopping_strategy!r}", hint=f"known: {', '.join(STOPPING_STRATEGIES)}")
    if probabilities is None:
        return
    if len(probabilities) != num_datasets or num_datasets < 2:
        raise ConfigError(
            f"interleave_prob has {len(probabilities)} values for {num_datasets} data sets",
            hint="give at least two data sets, one value each",
        )
    if min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-6:
        listed = " ".join(f"{value:g}" for value in probabilities)
        raise ConfigError(f"interleave_prob {listed}: the values have to be more than 0 and sum to 1", hint="for instance 0.7 0.3")


def choices(probabilities: Sequence[float], seed: int | Sequence[int], start: int = 0) -> Iterator[npt.NDArray[np.int64]]:
    """Endless batches of data set numbers, drawn independently; ``start`` draws are left out without being made.

    The n-th draw depends on the seed and n alone, and is what numpy's ``default_rng(seed).choice`` draws.
    """
    bits = np.random.PCG64(seed)
    bits.advance(start)
    random = np.random.Generator(bits)
    edges = np.cumsum(probabilities)
    edges /= edges[-1]
    while True:
        yield np.searchsorted(edges, random.random(_DRAWS), side="right")


def interleave(
    lengths: Sequence[int], probabilities: Sequence[float], stopping_strategy: str, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(data set, row in it) of each row of the mixture, as Hugging Face's ``interleave_datasets`` defines it.

    Each row comes from a data set drawn by ``probabilities``, whose rows are taken in order, again from the first after
    the last. It ends with the row that makes the first data set exhausted (``first_exhausted``: no row is taken twice)
    or the last one (``all_exhausted``: every row is taken at least once).
    """
    ends = _ends(np.array(lengths), probabilities, stopping_strategy == "all_exhausted", seed)
    chosen = np.concatenate(list(ends))
    rows = np.empty(len(chosen), np.int64)
    for number, length in enumerate(lengths):
        is_here = chosen == number
        rows[is_here] = np.arange(int(is_here.sum())) % length
    return chosen, rows


def _ends(lengths: npt.NDArray[np.int64], probabilities: Sequence[float], wants_all: bool, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """The draws up to the one that ends the mixture."""
    taken = np.zeros(len(lengths), np.int64)
    for drawn in choices(probabilities, seed):
        total = taken + np.bincount(drawn, minlength=len(lengths))
        is_exhausted = total >= lengths
        if is_exhausted.all() if wants_all else is_exhausted.any():
            last = [
                int(np.flatnonzero(drawn == number)[lengths[number] - taken[number] - 1])
                for number in range(len(lengths))
                if taken[number] < lengths[number] <= total[number]
            ]
            yield drawn[: (max(last) if wants_all else min(last)) + 1]
            return
        taken = total
        yield drawn
