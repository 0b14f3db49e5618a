"""The program of a process that another one starts: it ends when that one does, however that ends.

    python -P program.py cli WORD ...                 swift's own command line
    python -P program.py PROGRAM.py check|run         a package; the job is a line of JSON on standard input

Standard input stays open for as long as the starting process lives. This file and the ones in ``programs`` import nothing
of swift, since they run in whatever environment has the package.
"""

import json
import os
import runpy
import signal
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any


def _end_with_parent(*, kill: bool) -> None:
    """Wait until standard input ends, then end this process (by SIGTERM), or it and all that it has started (``kill``)."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    if kill:
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _watch(*, kill: bool) -> None:
    threading.Thread(target=_end_with_parent, kwargs={"kill": kill}, daemon=True).start()


def _write(path: str, value: Any) -> None:
    temporary = Path(path + ".tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, default=str), encoding="utf-8")
    temporary.replace(path)


def _work(program: str, action: str) -> None:
    """Do a job of the package of ``program``. What came out, or the error in its first line, is written to the job's ``answer`` file."""
    job = json.loads(_read_line())
    _watch(kill=True)
    try:
        answer = runpy.run_path(program)[action](job)
    except (Exception, SystemExit) as problem:
        traceback.print_exc()
        answer = {"error": (str(problem).strip() or type(problem).__name__), "kind": type(problem).__name__}
        if isinstance(problem, ModuleNotFoundError) and problem.name:  # a package that raises it by itself names nothing
            answer = {"missing": problem.name}
    _write(job["answer"], answer)


if __name__ == "__main__":
    if sys.argv[1] == "cli":
        _watch(kill=False)
        import_module("swift.cli").main(sys.argv[2:])
    else:
        _work(*sys.argv[1:3])
