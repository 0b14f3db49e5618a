"""A run that stands still: when that is so, which rank the others wait for, and where each of them is."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swift import progress
from swift.launch.rank import STACK_SIGNAL

_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
DUMP_S = 3.0  # how long ranks have to write their stacks


@dataclass(frozen=True)
class Watched:
    """A rank that the launcher watches."""

    rank: int
    pid: int
    folder: Path


def seconds_still(ranks: Sequence[Watched], now: float) -> float:
    """Seconds since any of ``ranks`` made progress; 0 as long as one has not begun to mark.

    One rank that goes on is enough: the others may wait for it, for instance while it writes a checkpoint.
    """
    marks = [progress.read(watched.folder / "progress") for watched in ranks]
    if not marks or not all(mark.count for mark in marks):
        return 0.0
    return min(now - mark.at for mark in marks)


def report(ranks: Sequence[Watched], seconds: float) -> str:
    """What a person is told: which rank the others wait for, then step, phase and place of each. Asks them for their stacks."""
    stacks = dump_stacks(ranks)
    places = {watched.rank: place_of(stacks[watched.rank]) for watched in ranks}
    marks = {watched.rank: progress.read(watched.folder / "progress") for watched in ranks}
    host = socket.gethostname()
    lines = [f"no process on {host} has made progress for {seconds:.0f} s{_who(marks, places)}"]
    for watched in ranks:
        mark, now = marks[watched.rank], time.monotonic()
        step = f"step {mark.step}" if mark.step is not None else "no step"
        lines.append(f"  rank {watched.rank}: {step}, {mark.phase}, for {now - mark.at:.0f} s, {places[watched.rank].text}")
        if trace := flight_record(watched.folder):
            lines.append(f"    {trace}")
    for watched in ranks:
        lines += [f"  the stack of rank {watched.rank}, innermost first, of {watched.folder / 'stacks.txt'}:"]
        lines += [f"  | {frame}" for frame in main_thread(stacks[watched.rank])[:20]] or [
            "  | it did not answer: it is stopped, or in the kernel"
        ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Place:
    """Where a rank is. ``collective`` is what of torch.distributed it waits in, if it does."""

    text: str
    collective: str | None


def _who(marks: dict[int, progress.Mark], places: dict[int, Place]) -> str:
    """The rank that the others wait for: the one in no collective, else the one that is behind."""
    busy = [rank for rank, place in places.items() if place.collective is None]
    if len(busy) == len(places):
        return ""
    if busy:
        return f": {_ranks(busy)} did not come to where the others wait"
    counts = {rank: mark.step if mark.step is not None else -1 for rank, mark in marks.items()}
    behind = [rank for rank, step in counts.items() if step == min(counts.values())]
    if len(behind) < len(counts):
        return f": {_ranks(behind)} is behind"
    different = {place.collective for place in places.values()}
    return (
        ": they wait in different collectives"
        if len(different) > 1
        else ": all wait in the same collective, for another machine or each other"
    )


def _ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def dump_stacks(ranks: Sequence[Watched]) -> dict[int, str]:
    """The stacks of all threads of each rank, as faulthandler writes them; empty for one that does not answer."""
    before = {watched.rank: _size(watched) for watched in ranks}
    for watched in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(watched.pid, STACK_SIGNAL)
        for pipe in watched.folder.glob("flight-pipe-*"):  # made by NCCL; a byte asks for its flight record
            with contextlib.suppress(OSError):
                descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                os.write(descriptor, b"1")
                os.close(descriptor)
    end = time.monotonic() + DUMP_S
    while time.monotonic() < end and any(_size(watched) == before[watched.rank] for watched in ranks):
        time.sleep(0.05)
    time.sleep(0.1)  # the last ones are still being written
    found = {}
    for watched in ranks:
        with contextlib.suppress(OSError):
            text = (watched.folder / "stacks.txt").read_bytes()[before[watched.rank] :]
            found[watched.rank] = text.decode(errors="replace")
    return {watched.rank: found.get(watched.rank, "") for watched in ranks}


def _size(watched: Watched) -> int:
    try:
        return (watched.folder / "stacks.txt").stat().st_size
    except OSError:
        return 0


def main_thread(stack: str) -> list[str]:
    """The frames of the main thread in what faulthandler wrote, innermost first: it writes that thread last."""
    return [line.strip() for line in stack.rpartition("most recent call first)")[2].splitlines() if _FRAME.match(line)]


def place_of(stack: str) -> Place:
    """Where a rank is by its stack: the innermost call of torch.distributed and who called it, or the innermost frame."""
    frames = [match.groups() for line in main_thread(stack) if (match := _FRAME.match(f"  {line}"))]
    if not frames:
        return Place("no stack", None)
    collective = None
    for file, line, function in frames:
        if "torch/distributed/" in file:
            if function != "wrapper":  # that which logs each collective of torch
                collective = function
        elif collective is not None:
            return Place(f"waits in {collective}, called from {file}:{line} in {function}", collective)
        elif "/torch/" not in file:
            break
    file, line, function = frames[0]
    return Place(f"in {file}:{line} in {function}" if collective is None else f"waits in {collective}", collective)


def flight_record(folder: Path) -> str | None:
    """The last collective that torch's flight recorder has of a rank, where the backend keeps one (NCCL); None elsewhere."""
    import pickle

    for path in sorted(folder.glob("flight*")):
        if path.suffix == ".pipe":
            continue
        with contextlib.suppress(OSError, pickle.UnpicklingError, EOFError, KeyError, IndexError):
            last = pickle.loads(path.read_bytes())["entries"][-1]
            number, sizes = last.get("collective_seq_id"), last.get("input_sizes")
            return f"last collective: {last['profiling_name']}, number {number}, {last['state']}, {sizes}"
    return None
