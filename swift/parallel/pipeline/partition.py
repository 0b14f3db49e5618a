"""Which blocks each stage of a pipeline has: a pure function of what they cost."""

import itertools
import math
from collections.abc import Sequence

from swift.errors import ConfigError


def partition(blocks: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Runs of ``blocks``, one for each stage, so that the costliest stage costs least, and among such runs the most even ones.

    ``first`` is what the first stage does besides (the embedding), ``last`` the last one (norm, head and loss), in the
    unit of ``blocks``. Every stage has a block. ConfigError if there are more stages than blocks.
    """
    if stages > len(blocks):
        raise ConfigError(
            f"{stages} pipeline stages are more than the {len(blocks)} blocks of this model",
            hint="lower --pipeline_model_parallel_size or --virtual_pipeline_model_parallel_size",
        )
    sums = [0.0]
    for block in blocks:
        sums.append(sums[-1] + block)

    def cost(stage: int, begin: int, end: int) -> float:
        return sums[end] - sums[begin] + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)

    count = len(blocks)
    # least[end]: the costliest of the stages so far, with the blocks before ``end`` in them.
    least = [math.inf if end == 0 else cost(0, 0, end) for end in range(count + 1)]
    for stage in range(1, stages):
        least = [min((max(least[at], cost(stage, at, end)) for at in range(stage, end)), default=math.inf) for end in range(count + 1)]
    allowed = least[count] * (1 + 1e-9)

    def square(stage: int, begin: int, end: int) -> float:
        own = cost(stage, begin, end)
        return own**2 if own <= allowed else math.inf

    even = [math.inf if end == 0 else square(0, 0, end) for end in range(count + 1)]
    begins: list[list[int]] = []
    for stage in range(1, stages):
        options = [[(even[at] + square(stage, at, end), at) for at in range(stage, end)] for end in range(count + 1)]
        even = [min(each, default=(math.inf, 0))[0] for each in options]
        begins.append([min(each, default=(math.inf, 0))[1] for each in options])
    ends = [count]
    for choice in reversed(begins):
        ends.append(choice[ends[-1]])
    ends = [0, *reversed(ends)]
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]
