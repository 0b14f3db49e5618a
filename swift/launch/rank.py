"""What a process of several does before its command, and what it leaves when it fails. Light: --help passes here too.

A rank is started by swift launch, by torchrun, by srun or by Ray. Only the first sets ``FOLDER``, and reads all of what is
left; torchrun reads the file of the error.
"""

import ctypes
import faulthandler
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from swift import console, progress
from swift.config.launch import is_training
from swift.errors import SwiftError
from swift.launch.slurm_step import ranks_of_step

FOLDER = "SWIFT_LAUNCH_RANK"  # the folder in which this rank leaves its logs, its stack and its error
RESUME = "SWIFT_LAUNCH_RESUME"  # the run directory with which the ranks go on that were started again
PARENT = "SWIFT_LAUNCH_PID"  # the launcher, without which a rank does not live on
MARKER = "== rank {rank} ends with an error =="  # what stands below is in the log, and not on the terminal: the launcher says it
STACK_SIGNAL = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1


def enter(words: Sequence[str]) -> list[str]:
    """Make this process a good rank, if it is one; gives the words of its command, changed if it goes on from a checkpoint."""
    if is_training(words):  # swift launch itself is started by srun too
        os.environ.update(ranks_of_step(os.environ))
    place = os.environ.get(FOLDER)
    if place is None:
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            _die_with(os.getppid())  # torchrun leaves its ranks running when it is killed
        return list(words)
    _die_with(int(os.environ[PARENT]))
    folder = Path(place)
    # Whole lines of Python and of libraries in C, in the order in which they were written.
    for descriptor in (1, 2):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, file=(folder / "stacks.txt").open("w"), all_threads=True)
    if slot := os.environ.get(progress.FILE_VARIABLE):
        progress.open_slot(Path(slot))
    sys.excepthook = _on_exception
    return resumed(words, os.environ[RESUME]) if os.environ.get(RESUME) else list(words)


def run_to_resume(place: Path) -> str | None:
    """The run directory whose path a rank of an earlier attempt left in ``place``, if it holds a run that can be gone on with."""
    if not place.is_file():
        return None
    run = Path(place.read_text(encoding="utf-8"))
    return str(run) if (run / "args.json").is_file() else None


def resumed(words: Sequence[str], run: str) -> list[str]:
    """``words`` so that they go on with ``run`` from its newest checkpoint."""
    dropped = {"resume_from_checkpoint", "resume_only_model", "adapters"}  # they said how the first attempt begins
    kept: list[str] = []
    is_dropped = False
    for word in words:
        if word.startswith("--"):
            is_dropped = word[2:].partition("=")[0].replace("-", "_") in dropped
        if not is_dropped:
            kept.append(word)
    return [*kept, "--resume_from_checkpoint", run, "--resume_only_model", "false", "--adapters"]


def fail(problem: SwiftError) -> bool:
    """Leave ``problem`` to the launcher; True if the launcher says it, so that this process need not."""
    _leave(problem)
    if FOLDER not in os.environ:
        return False
    _print_marker()
    print(f"error: {problem.message}" + (f"\nhint: {problem.hint}" if problem.hint else ""), file=sys.stderr, flush=True)
    return True


def _on_exception(kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
    _leave(problem)
    _print_marker()
    traceback.print_exception(kind, problem, trace)
    sys.stderr.flush()


def _print_marker() -> None:
    sys.stdout.flush()
    print(MARKER.format(rank=os.environ.get("RANK", "0")), file=sys.stderr, flush=True)


def _leave(problem: BaseException) -> None:
    """Write the file that torchrun reads for each process that failed, with what swift launch needs beside it."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return
    now = time.time()
    is_ours = isinstance(problem, SwiftError)
    hint = getattr(problem, "hint", None)
    # What torchrun prints below "traceback": where one of our errors was raised helps nobody.
    lines = f"{problem}" + (f"\nhint: {hint}" if hint else "") if is_ours else "".join(traceback.format_exception(problem))
    record: dict[str, Any] = {
        # torch reads whole seconds (torch.distributed.elastic.multiprocessing.errors, 2.13)
        "message": {"message": f"{type(problem).__name__}: {problem}", "extraInfo": {"py_callstack": lines, "timestamp": str(int(now))}},
        "rank": os.environ.get("RANK", "0"),
        "time": now,
        "is_ours": is_ours,
        "text": problem.message if isinstance(problem, SwiftError) else str(problem),
        "hint": hint,
        "is_of_others": _is_of_others(problem),
    }
    try:
        Path(place).write_text(json.dumps(record), encoding="utf-8")
    except OSError as trouble:
        console.warn(f"{place}: {trouble.strerror}")


def _is_of_others(problem: BaseException) -> bool:
    """Whether ``problem`` came out of waiting for others, and so most likely only follows from what befell one of them."""
    innermost = traceback.extract_tb(problem.__traceback__)[-1:]
    return bool(innermost) and not isinstance(problem, SwiftError) and "torch/distributed/" in innermost[0].filename


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when the launcher ends, whatever ends it. Elsewhere than on Linux nothing is set."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGKILL)
