"""The tools that the benchmarks compare, how each is told to do the same job, and how one run of it is measured.

Nothing of a tool is imported here: each runs as its users run it, as a command in a process of its own.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BENCH = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("SWIFT_PEERS", BENCH / "peers"))
PACKAGES = ("ms-swift", "swift-llm", "torch", "transformers", "trl", "peft", "accelerate", "datasets")

# The same training for every peer: LoRA on all linear layers, float32, rows in file order, padded or packed as the
# tool does by default, one logged loss a step, nothing saved but the log.
SAME_TRAINING = (
    "--tuner_type lora --lora_rank 8 --lora_alpha 16 --lora_dropout 0 --target_modules all-linear"
    " --torch_dtype float32 --attn_impl sdpa --gradient_checkpointing false"
    " --max_length 512 --truncation_strategy right --dataset_shuffle false --train_dataloader_shuffle false"
    " --per_device_train_batch_size 4 --gradient_accumulation_steps 4"
    " --learning_rate 1e-4 --lr_scheduler_type cosine --weight_decay 0 --adam_beta2 0.999 --max_grad_norm 1.0"
    " --seed 42 --logging_steps 1 --save_strategy no --eval_strategy no --report_to none --add_version false"
).split()
ROWS_PER_STEP = 16


@dataclass(frozen=True)
class Peer:
    """A tool: its name in the results, its interpreter, and the further options it needs for SAME_TRAINING.

    ``options`` are what its defaults do not do on a CPU, or cannot find out for themselves.
    """

    name: str
    python: Path
    options: tuple[str, ...] = ()

    @property
    def command(self) -> Path:
        """The console script beside the interpreter; exits with a hint if the tool is not installed."""
        script = self.python.parent / "swift"
        if not script.exists():
            how = "pip install -e ." if self.name == "swift" else "bench/peers.sh swift"
            sys.exit(f"{self.name}: {script} does not exist; make it with: {how}")
        return script

    def train_command(self, model: Path, dataset: Path, output: Path, steps: int) -> list[str]:
        job = ["--model", str(model), "--dataset", str(dataset), "--output_dir", str(output), "--max_steps", str(steps)]
        return [str(self.command), "sft", *job, *SAME_TRAINING, *self.options]

    def versions(self) -> dict[str, str]:
        """Python's and the relevant packages' versions in the peer's environment."""
        code = (
            "import json, platform, importlib.metadata as m\n"
            "found = {d.metadata['Name'].replace('_', '-'): d.version for d in m.distributions()}\n"
            f"kept = {{name: found[name] for name in {PACKAGES!r} if name in found}}\n"
            "print(json.dumps({'python': platform.python_version(), **kept}))"
        )
        out = subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True, cwd=PEERS.anchor)
        return dict(json.loads(out.stdout))


PEER_BY_NAME = {
    "swift": Peer("swift", Path(sys.executable)),
    "ms-swift": Peer(
        "ms-swift",
        PEERS / "ms-swift" / "bin" / "python",
        # It refuses a local model without a model type; float32 on a CPU would switch fp16 autocast on; and it would
        # ask a hub for 20 s, offline, whether a local model is the latest.
        tuple(
            "--model_type llama --template chatml --use_cpu true --bf16 false --fp16 false --warmup_ratio 0"
            " --check_model false --split_dataset_ratio 0 --dataset_num_proc 1 --dataloader_num_workers 0".split()
        ),
    ),
}


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


def logged_losses(output: Path) -> list[float]:
    """The loss of each step as the tool itself logged it in ``output``/logging.jsonl."""
    lines = (output / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["loss"] for row in rows if "loss" in row]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def machine() -> str:
    """One line on the machine, for the head of a result."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in about if line.startswith("model name")), platform.machine())
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, load before {load}"


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="swift-bench-")


def failure(name: str, result: Run) -> str:
    """What to show when a run did not do its job."""
    tail = "\n".join(result.log.splitlines()[-15:])
    return f"{name}: exit code {result.exit_code}; the last lines of its output:\n{tail}"
