"""Programs of other packages, and of a server, as processes of ours: none outlives this one, and none is left by Ctrl-C."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.evaluate import EvalConfig
from swift.errors import ConfigError, DependencyError, MachineError, SwiftError
from swift.evaluate.external.base import PYTHON
from swift.files import explain_os_errors

PROGRAM = Path(__file__).with_name("program.py")
PROGRAMS = Path(__file__).with_name("programs")
# What the packages are called on PyPI that do not go into one environment with swift (see pyproject.toml), by their modules.
# pip puts a pyarrow beside OpenCompass 0.5.4 that does not import with the numpy that it asks for.
APART = {"evalscope": "evalscope", "opencompass": "opencompass 'pyarrow<21'", "vlmeval": "ms-vlmeval"}
GRACE_S = 10.0  # a process that was told to end is killed after so long
POLL_S = 0.1


@dataclass
class Child:
    """A process in a group of its own. It reads what stands in ``log`` of itself, from ``begin`` on, when something goes wrong."""

    process: "subprocess.Popen[bytes]"
    log: Path
    name: str
    begin: int

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def told(self) -> str:
        """What it said last: its line about an error if there is one, else the last line."""
        text = self.log.read_bytes()[self.begin :].decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines[-30:] if line.lower().startswith("error") or "Error: " in line]
        return (errors or lines or ["it said nothing"])[-1][:300]

    def ended(self) -> MachineError:
        """The error of a process that has ended by itself."""
        return MachineError(f"{self.name} ended with code {self.process.wait()}: {self.told()}", hint=f"see {self.log}")

    def send(self, line: bytes) -> None:
        """Write to its standard input. A process that is gone is found by ``is_alive``."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()


@contextlib.contextmanager
def started(
    name: str, words: Sequence[str], log: Path, *, python: str = sys.executable, env: dict[str, str] | None = None
) -> Iterator[Child]:
    """``program.py`` with ``words``, whose output goes to ``log``. It is ended with the block, with all that it started."""
    command = [python, "-P", str(PROGRAM), *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with explain_os_errors(log), log.open("ab") as output:
        begin = output.tell()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        except (FileNotFoundError, PermissionError):  # a folder, too
            raise ConfigError(
                f"there is no Python at {python}", hint='say --extra_eval_args \'{"python": "ENVIRONMENT/bin/python"}\''
            ) from None
    child = Child(process, log, name, begin)
    try:
        yield child
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    try:
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
            process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process.pid, signal.SIGKILL)  # also those that it started
        process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody of it is left
        os.killpg(group, number)


def python_of(config: EvalConfig) -> str:
    """The interpreter that has the package: ours, or the one that --extra_eval_args names."""
    named = (config.extra_eval_args or {}).get(PYTHON, sys.executable)
    if not isinstance(named, str):
        raise ConfigError(f"--extra_eval_args has python: {named!r}", hint="it takes the path of an interpreter")
    return named


def require(module: str, config: EvalConfig, *, extra: str | None = None) -> None:
    """DependencyError if our interpreter is to run ``module`` and has none, which ``extra`` brings. Nothing is imported."""
    if python_of(config) == sys.executable and importlib.util.find_spec(module) is None:
        raise _missing(module, module, extra)


def _missing(module: str, package: str, extra: str | None = None) -> DependencyError:
    name = module.split(".")[0]
    if name in APART:
        hint = f'python -m venv DIR; DIR/bin/pip install {APART[name]}; then --extra_eval_args \'{{"python": "DIR/bin/python"}}\''
        return DependencyError(f"the package {name} is not installed", hint=hint)
    if extra or name == "lm_eval":
        return DependencyError(f"the package {name} is not installed", hint=f"pip install 'swift-llm[{extra or name}]'")
    return DependencyError(f"{package} needs the package {name} for this", hint=f"pip install {name}, where {package} is")


def work(
    package: str,
    action: str,
    job: dict[str, Any],
    config: EvalConfig,
    *,
    log: Path | None = None,
    server: Child | None = None,
    programs: Path = PROGRAMS,
) -> dict[str, Any]:
    """What ``package`` answers to ``job`` (see program.py), in a process of its own. ``log`` keeps what it prints.

    Raises DependencyError if it or a package of it is absent, ConfigError or MachineError with the first line of its own
    error (``check`` or ``run``), MachineError if it or the ``server`` that it asks ends.
    """
    with tempfile.TemporaryDirectory(prefix="swift-eval-") as folder:
        answer = Path(folder, "answer.json")
        kept = log or Path(folder, "log.txt")
        with started(package, [str(programs / f"{package}.py"), action], kept, python=python_of(config), env=_environment(config)) as child:
            child.send(json.dumps(job | {"answer": str(answer)}).encode() + b"\n")
            while child.is_alive:
                if server is not None and not server.is_alive:
                    raise server.ended()
                time.sleep(POLL_S)
            if not answer.exists():
                raise child.ended()
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if found.get("missing"):
        raise _missing(found["missing"], package)
    if "error" in found:
        raise _refused(package, action, found, log)
    return found


def _refused(package: str, action: str, found: dict[str, Any], log: Path | None) -> SwiftError:
    line = str(found["error"]).splitlines()[0]
    if action == "check":
        return ConfigError(f"{package} refuses: {line}")
    return MachineError(f"{package} failed: {found['kind']}: {line}", hint=f"see {log}" if log else None)


def _environment(config: EvalConfig) -> dict[str, str]:
    """Without PYTHONPATH, which is meant for our interpreter; and no hub is asked where that is not wanted."""
    made = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or python_of(config) == sys.executable}
    if config.offline:
        made |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return made
