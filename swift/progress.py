"""How far a process of a training run is: a mark in a small shared file, which a watchdog in another process reads.

A mark costs less than a microsecond, and nothing reaches the disk. Without a launcher there is no file, and marks do nothing.
"""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

FILE_VARIABLE = "SWIFT_PROGRESS"  # the launcher says here which file a rank marks
RUN_VARIABLE = "SWIFT_LAUNCH_RUN"  # and here in which file a rank leaves the path of its run directory
_LAYOUT = struct.Struct("<Qdq40s")  # marks so far, seconds of the monotonic clock, step (-1: none), phase

_slot: mmap.mmap | None = None
_count = 0
_step = -1


@dataclass(frozen=True)
class Mark:
    """What a rank has said last. ``count`` is 0 while it is not watched; ``at`` is time.monotonic() of this machine."""

    count: int
    at: float
    step: int | None
    phase: str


def create(path: Path) -> None:
    """An empty file for the marks of one rank."""
    path.write_bytes(bytes(_LAYOUT.size))


def open_slot(path: Path) -> None:
    """Let this process mark its progress in ``path`` from now on."""
    global _slot, _count, _step
    with path.open("r+b") as file:
        _slot = mmap.mmap(file.fileno(), _LAYOUT.size)
    _count, _step = 0, -1


def mark(step: int | None = None, phase: str = "") -> None:
    """Say that this process goes on: with ``phase`` (at most 40 bytes) of ``step``, or of the step it named last."""
    global _count, _step
    if _slot is None:
        return
    _count += 1
    if step is not None:
        _step = step
    _LAYOUT.pack_into(_slot, 0, _count, time.monotonic(), _step, phase.encode())


def unwatch(phase: str) -> None:
    """Say that ``phase`` begins, which may take any time: nobody counts it as standing still until the next mark."""
    if _slot is not None:
        _LAYOUT.pack_into(_slot, 0, 0, time.monotonic(), _step, phase.encode())


def read(path: Path) -> Mark:
    """The last mark in ``path``; without one if the file cannot be read."""
    try:
        count, at, step, phase = _LAYOUT.unpack(path.read_bytes())
    except (OSError, struct.error):
        return Mark(0, 0.0, None, "")
    return Mark(count, at, step if step >= 0 else None, phase.rstrip(b"\0").decode(errors="replace"))


def tell_run(run: Path) -> None:
    """Leave the path of the run directory to the launcher, so that ranks that are started again go on in it.

    One rank of each machine does so: any machine may be replaced by one that knows nothing.
    """
    place = os.environ.get(RUN_VARIABLE)
    if place and os.environ.get("LOCAL_RANK", "0") == "0":
        temporary = Path(f"{place}.{os.getpid()}.tmp")
        temporary.write_text(str(run.absolute()), encoding="utf-8")
        temporary.replace(place)
