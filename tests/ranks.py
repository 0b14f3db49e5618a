"""Several processes for one test: forked from a process that has its imports, joined by gloo, each with a deadline."""

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

DEADLINE_S = 120


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_ranks(size: int, function: Any, *arguments: Any, deadline_s: float = DEADLINE_S, env: dict[str, str] | None = None) -> list[Any]:
    """What ``function(*arguments)`` gives in each of ``size`` processes, by rank; they find RANK and the rest set, as torchrun sets them.

    The function joins the others itself (swift.parallel.world.join), or a command that it runs does. What it gives is
    pickled. AssertionError with the traceback of the first process that fails; the others are killed then, as after the
    deadline. Processes are forked: nothing may have started threads that hold locks, so keep OMP_NUM_THREADS at 1.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = free_port()
        pids = [_fork(rank, size, port, Path(folder), function, arguments, env or {}, deadline_s) for rank in range(size)]
        failed = _wait(pids, deadline_s)
        results = [_result(Path(folder) / str(rank)) for rank in range(size)]
    errors = [f"rank {rank}: {result[1]}" for rank, result in enumerate(results) if result is not None and not result[0]]
    if errors:
        raise AssertionError("\n".join(errors))
    assert failed is None, failed
    return [result[1] for result in results if result is not None]


def _fork(
    rank: int, size: int, port: int, folder: Path, function: Any, arguments: tuple[Any, ...], env: dict[str, str], deadline_s: float
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
        faulthandler.dump_traceback_later(deadline_s * 0.9, file=sys.__stderr__)
        try:
            result: tuple[bool, Any] = (True, function(*arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        temporary = folder / f".{rank}"
        temporary.write_bytes(pickle.dumps(result))
        temporary.rename(folder / str(rank))
        code = 0 if result[0] else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], deadline_s: float) -> str | None:
    """Until all have ended. After the first that fails, and after the deadline, the rest is killed."""
    left, end, failed = set(pids), time.monotonic() + deadline_s, None
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                if status and failed is None:
                    failed = f"rank {pids.index(pid)} ended with status {os.waitstatus_to_exitcode(status)}"
                    end = min(end, time.monotonic() + 5)  # the others see it too, or hang
        if left and time.monotonic() > end:
            failed = failed or f"ranks {sorted(pids.index(pid) for pid in left)} have not ended after {deadline_s} s"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):  # it has only just begun, or ends
                    os.killpg(pid, signal.SIGKILL)  # with those that it has started
        time.sleep(0.01)
    return failed


def _result(path: Path) -> tuple[bool, Any] | None:
    return pickle.loads(path.read_bytes()) if path.is_file() else None
