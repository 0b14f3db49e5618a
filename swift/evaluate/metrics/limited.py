"""Runs a program that a model has written, in a process of its own that has limits.

What the limits do: seconds, memory, size and number of files, no further processes for a user that is not root, an empty folder of
its own, no environment, and, where the system lets us (user namespaces), no network and no reach of other processes.
What they do not protect from: the program runs as you. It can read and overwrite whatever you can, where the paths are known to it;
a hole in the kernel is open to it; without namespaces, what it starts as root in a session of its own outlives it; and a program that
looks for how it is judged can cheat. Use a container for models that you do not trust.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import ceil
from pathlib import Path

_RUNNER = """
import json, os, sys
asked = json.loads(sys.stdin.buffer.read())
said = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
import resource
for name, limit in asked["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (limit, limit))
    except (AttributeError, OSError, ValueError):
        pass
token, verdict = asked["token"], "passed"
names = {"__name__": "__main__"}
try:
    exec(compile(asked["program"], "program.py", "exec"), names)
except AssertionError as problem:
    verdict = "a test fails" + (": " + str(problem)[:200] if str(problem) else "")
except SystemExit:
    verdict = "it ends itself"
except MemoryError:
    verdict = "more memory than the limit"
except BaseException as problem:
    verdict = type(problem).__name__ + ": " + str(problem)[:200]
os.write(said, (token + verdict).encode("utf-8", "replace"))
os._exit(0)
"""


@dataclass(frozen=True)
class Limits:
    """``timeout_s`` of wall time, and as much of processor time."""

    timeout_s: float = 10.0
    memory_mib: int = 1024
    file_mib: int = 16


@dataclass(frozen=True)
class Ran:
    """``reason`` is "passed", or what went wrong."""

    passed: bool
    reason: str


def run_limited(program: str, limits: Limits) -> Ran:
    """Whether ``program`` (Python) runs to its end without an error."""
    token = secrets.token_hex(16)
    asked = {"program": program, "token": token, "limits": _resources(limits)}
    with tempfile.TemporaryDirectory(prefix="swift-code-", ignore_cleanup_errors=True) as folder:
        words = [*isolation(), sys.executable, "-I", "-X", "utf8", "-c", _RUNNER]
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(asked).encode(), timeout=limits.timeout_s)
        except subprocess.TimeoutExpired:
            return Ran(False, f"it takes more than {limits.timeout_s:g} s")
        finally:
            _kill(process)
    said = out.decode("utf-8", "replace")
    if not said.startswith(token):
        return Ran(False, "it ends itself" if process.returncode == 0 else f"it breaks off with status {process.returncode}")
    return Ran(said == token + "passed", said.removeprefix(token))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process with all that it began, whatever became of it. What has left its group may hold its output open: nobody reads on."""
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # input that nobody took
                stream.close()


def _resources(limits: Limits) -> dict[str, int]:
    seconds = ceil(limits.timeout_s) + 1
    return {
        "RLIMIT_AS": limits.memory_mib * 2**20,
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": limits.file_mib * 2**20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }


@functools.cache
def isolation() -> tuple[str, ...]:
    """The words before a command that take network and other processes from it; none where the system does not let us."""
    program = shutil.which("unshare")
    if program is None:
        return ()
    for words in (("--user", "--map-root-user"), ()):
        made = (program, *words, "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL")
        done = subprocess.run([*made, sys.executable, "-I", "-c", ""], capture_output=True, cwd=Path("/"))
        if done.returncode == 0:
            return made
    return ()
