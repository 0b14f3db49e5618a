"""How one run of a tool is measured: a command in a process of its own, watched from outside."""

import json
import multiprocessing
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BENCH = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("SWIFT_PEERS", BENCH / "peers"))
PACKAGES = ("ms-swift", "llamafactory", "swift-llm", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
PACKAGES += ("GPTQModel", "llmcompressor", "compressed-tensors", "auto-round")


@dataclass(frozen=True)
class Run:
    """What one command cost, over its whole process tree, and what the probe saw in it (empty if it never trained)."""

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    probe: dict[str, Any]
    log: str


def run(command: Sequence[str], *, threads: int, scratch: Path, probe: bool = False) -> Run:
    """Run ``command`` in ``scratch`` to its end and measure it.

    Offline: no hub answers, so that no peer waits for a network. Peak RSS is the largest of any one process, since
    the tools train in one process (a child of the command, or the command itself). Megabytes are 10^6 bytes.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    log_path, seen = scratch / "log.txt", scratch / "probe"
    seen.mkdir(exist_ok=True)
    environment = _environment(threads, scratch)
    with log_path.open("wb") as log:
        launched_at = time.monotonic()
        if probe:
            environment |= {"PYTHONPATH": str(BENCH / "probe"), "SWIFT_PROBE_DIR": str(seen)}
            environment["SWIFT_PROBE_START"] = repr(launched_at)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=scratch, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - launched_at
    process.returncode = os.waitstatus_to_exitcode(status)
    records = [json.loads(path.read_text()) for path in seen.glob("*.json")]
    return Run(
        exit_code=process.returncode,
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_mb=usage.ru_maxrss * 1024 / 1e6,
        probe=max(records, key=lambda record: len(record["steps"]), default={}),
        log=log_path.read_text(errors="replace"),
    )


def _environment(threads: int, scratch: Path) -> dict[str, str]:
    """Ours without anything that could steer a peer: no PYTHONPATH, caches of its own, hubs off."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "SWIFT_"))}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HOME": str(scratch / "hf"),
        "MODELSCOPE_CACHE": str(scratch / "modelscope"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "USE_HF": "1",  # ms-swift: ask Hugging Face's hub, which is off, and not ModelScope's
        "TOKENIZERS_PARALLELISM": "false",
    }


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` in a process of its own, for what imports torch or transformers.

    The process that launches the peers has to stay small: Linux counts its memory in a child's peak (at exec).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def tree(root: int) -> list[int]:
    """The process and all below it."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def memory_mb(pid: int) -> tuple[float, float] | None:
    """(resident, of that without pages of files) of a process; None if it is gone."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    except OSError:
        return None
    if "VmRSS" not in lines:
        return None
    rss, anonymous = (int(lines[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "RssAnon"))
    return rss, anonymous


def cpu_s(root: int) -> float:
    """CPU seconds so far of a process and of those below it that live."""
    ticks = 0
    for pid in tree(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])  # utime and stime: fields 14 and 15 of all
    return ticks / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """One line on the machine, for the head of a result."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in about if line.startswith("model name")), platform.machine())
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, load before {load}"


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="swift-bench-")


def versions(python: Path) -> dict[str, str]:
    """Python's and the relevant packages' versions in the environment of an interpreter."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        "found = {d.metadata['Name'].replace('_', '-'): d.version for d in m.distributions()}\n"
        f"kept = {{name: found[name] for name in {PACKAGES!r} if name in found}}\n"
        "print(json.dumps({'python': platform.python_version(), **kept}))"
    )
    out = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=PEERS.anchor)
    return dict(json.loads(out.stdout))


def reason(result: Run) -> str:
    """Why a run failed, in one line: the last error that it printed, or else its last line."""
    if result.exit_code == 0:
        return "it ended without an optimizer step that the probe saw"
    lines = [line.strip() for line in result.log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)|error|swift): ", line)]
    # What a launcher says of the command that it launched comes last and gives no reason.
    own = [line for line in errors if "CalledProcessError" not in line] or errors
    return f"exit code {result.exit_code}: {(own or lines or ['no output'])[-1]}"


def failure(name: str, result: Run) -> str:
    """What to show when a run did not do its job."""
    tail = "\n".join(result.log.splitlines()[-15:])
    return f"{name}: exit code {result.exit_code}; the last lines of its output:\n{tail}"
