"""Processes that work on a stream of parts, and give the results back in order."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from swift.errors import MachineError

T = TypeVar("T")
P = TypeVar("P")

# Below this, starting processes (each imports transformers, seconds of work) gains little.
MANY_BYTES = 64 << 20
MANY_ROWS = 100_000
MOST_PROCESSES = 8
_PARTS_AHEAD = 4


def usual() -> int:
    """The number of processes for large data: the cores that this process may use, up to MOST_PROCESSES.

    1 in a script: each new process would run it again, if it is not guarded by ``if __name__ == "__main__"``.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is not None and getattr(main, "__spec__", None) is None and Path(file).stem != "swift":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


@contextlib.contextmanager
def workers(num_proc: int, initialize: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[ProcessPoolExecutor]:
    """``num_proc`` new processes, each of which has called ``initialize(*arguments)``.

    Not forked: the tokenizer and torch have threads by now. The arguments travel in a file, because Python waits forever
    for a process that ends before it has read a large argument.
    """
    with tempfile.NamedTemporaryFile(prefix="swift-") as file:
        pickle.dump((initialize, arguments), file)
        file.flush()
        pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _begin, (file.name,))
        try:
            yield pool
        except BrokenProcessPool:
            raise MachineError(
                "a process that reads or tokenizes rows has ended before its work",
                hint='a script of your own needs if __name__ == "__main__"; if memory is short, lower --dataset_num_proc',
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(path: str) -> None:
    """In the new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    with open(path, "rb") as file:
        initialize, arguments = pickle.load(file)
    initialize(*arguments)
    gc.freeze()  # what is here now stays: no collection has to look at it


def in_order(pool: ProcessPoolExecutor, num_proc: int, work: Callable[[P], T], parts: Iterable[P]) -> Iterator[T]:
    """``work(part)`` of each part, in order, with a few parts a process under way: neither parts nor results pile up."""
    waiting: deque[Future[T]] = deque()
    for part in parts:
        waiting.append(pool.submit(work, part))
        if len(waiting) >= num_proc * _PARTS_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
