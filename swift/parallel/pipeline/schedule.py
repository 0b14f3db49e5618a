"""In which order each process of a pipeline computes its stages, and when it speaks to the others: pure functions.

A process of a pipeline of P processes with V runs of blocks each has the stages rank, rank + P, ...: a micro-batch goes
round V times. All processes work out the whole table, so that both ends of a transfer post it in the same order: nothing
can wait for something that comes after it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from swift.errors import ConfigError

# P processes of a pipeline, V runs of blocks of each, M micro-batches of a step


class Action(NamedTuple):
    """The forward or backward pass of one micro-batch through one stage."""

    is_forward: bool
    stage: int
    batch: int

    def __str__(self) -> str:
        return f"{self.stage}{'F' if self.is_forward else 'B'}{self.batch}"


Table = list[list[Action | None]]


def forward_only(processes: int, virtual: int, batches: int) -> list[list[Action]]:
    """The actions of each process when nothing is trained."""
    return [[Action(True, *place) for place in _places(rank, processes, virtual, batches)] for rank in range(processes)]


def gpipe(processes: int, virtual: int, batches: int) -> list[list[Action]]:
    """All forward passes, then all backward passes: M micro-batches are alive at once.

    Source: Huang et al. 2019 (arXiv:1811.06965).
    """
    return [
        [Action(True, *place) for place in _places(rank, processes, virtual, batches)]
        + [Action(False, *place) for place in _places(rank, processes, virtual, batches, is_backward=True)]
        for rank in range(processes)
    ]


def one_forward_one_backward(processes: int, virtual: int, batches: int) -> list[list[Action]]:
    """As few forward passes as keep all busy, then a backward pass after each: at most P - rank are alive at once if V = 1.

    With V > 1 (interleaved) the idle time at both ends is V times as short, for V times as many transfers.
    Sources: Narayanan et al. 2019 (PipeDream-flush), 2021 (arXiv:2104.04473, section 2.2).
    """
    orders = []
    for rank in range(processes):
        forwards = [Action(True, *place) for place in _places(rank, processes, virtual, batches)]
        backwards = [Action(False, *place) for place in _places(rank, processes, virtual, batches, is_backward=True)]
        ahead = processes - rank - 1
        if virtual > 1:
            ahead = 2 * ahead + (virtual - 1) * len(_rounds(processes, virtual, batches)[0])
        ahead = min(ahead, len(forwards))
        order = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            order += [forward, backward]
        orders.append(order + backwards[len(forwards) - ahead :])
    return orders


SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "interleaved": one_forward_one_backward}


def _places(rank: int, processes: int, virtual: int, batches: int, *, is_backward: bool = False) -> list[tuple[int, int]]:
    """(stage, micro-batch) in order: the micro-batches of a round go through all stages of a process before the next round."""
    runs = [run * processes + rank for run in range(virtual)]
    stages = runs[::-1] if is_backward else runs
    return [(stage, batch) for group in _rounds(processes, virtual, batches) for stage in stages for batch in group]


def _rounds(processes: int, virtual: int, batches: int) -> list[range]:
    """The micro-batches in rounds of P, or where M is no multiple of P of a few more, the larger rounds first.

    A round of fewer than P would let the processes wait for one another for ever.
    """
    count = max(1, batches // processes) if virtual > 1 else 1
    size, left = divmod(batches, count)
    begins = [index * size + min(index, left) for index in range(count + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(begins)]


def in_time(orders: Sequence[Sequence[Action]], stages: int) -> Table:
    """``orders`` as a table of equal steps of time, a row for each process: every action as soon as what it needs is there.

    ConfigError if the orders wait for one another.
    """
    at = [0] * len(orders)
    table: Table = [[] for _ in orders]
    done: set[Action] = set()
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        ready: list[Action] = []
        for rank, order in enumerate(orders):
            action = order[at[rank]] if at[rank] < len(order) else None
            if action is not None and all(need in done for need in needs(action, stages)):
                at[rank] += 1
                ready.append(action)
                table[rank].append(action)
            else:
                table[rank].append(None)
        if not ready:
            raise ConfigError(f"the schedule waits for itself after {len(done)} of {sum(map(len, orders))} passes")
        done.update(ready)
    return table


def needs(action: Action, stages: int) -> list[Action]:
    """The passes that have to be over before ``action``."""
    if action.is_forward:
        return [action._replace(stage=action.stage - 1)] if action.stage else []
    after = [action._replace(stage=action.stage + 1)] if action.stage + 1 < stages else []
    return [action._replace(is_forward=True), *after]


def receiver(action: Action, stages: int) -> int | None:
    """The stage that gets what ``action`` computes; None if none does."""
    stage = action.stage + (1 if action.is_forward else -1)
    return stage if 0 <= stage < stages else None


def idle_share(processes: int, virtual: int, batches: int) -> float:
    """The share of the time in which a process waits, if all stages take the same time: (P - 1) / (V M + P - 1).

    Source: Narayanan et al. 2021 (arXiv:2104.04473, section 2.2), where it is told as a fraction of the busy time.
    """
    return (processes - 1) / (virtual * batches + processes - 1)
