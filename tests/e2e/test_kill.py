"""A run that is killed again and again ends with the same bits as one that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swift import audit
from swift.model.checkpoints import checkpoints_in

KILLS = 20
STEPS = 160  # a killed run does the 3 till it saves, and those of LEFT_S
LEFT_S = 0.1


def command(model: Path, rows: Path, run: Path, *more: str, steps: int = STEPS) -> list[str]:
    return [
        sys.executable,
        "-m",
        "swift.cli",
        "sft",
        "--model",
        str(model),
        "--dataset",
        str(rows),
        "--output_dir",
        str(run),
        "--add_version",
        "false",
        "--max_steps",
        str(steps),
        "--save_steps",
        "3",
        "--save_total_limit",
        "3",
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "2",
        "--learning_rate",
        "1e-2",
        "--logging_steps",
        "4",
        "--report_to",
        "none",
        "--report_samples",
        "0",
        "--split_dataset_ratio",
        "0.2",
        "--eval_steps",
        "10",
        *more,
    ]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "SWIFT_CACHE": str(cache)}


def stable(run: Path) -> list[dict[str, object]]:
    clock = {"tokens_per_s", "supervised_tokens_per_s", "memory(GiB)", "eval_runtime"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


# Starts a command in a process of its own for each line that it reads, with packages that are imported already.
LAUNCHER = """
import json, os, sys
import peft, transformers.models.llama.modeling_llama, swift.train.run
from swift.cli import main
for line in sys.stdin:
    if not (pid := os.fork()):
        sys.exit(main(json.loads(line)))
    print("started", pid, flush=True)
    print("ended", os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture
def launched(tmp_path):
    """Runs a command to its end, or kills it some seconds after its start, or after it has saved once more."""
    env = environment(tmp_path / "cache")
    words = [sys.executable, "-u", "-c", LAUNCHER]
    launcher = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def until(begin):
        seen = []
        for line in launcher.stdout:
            seen.append(line)
            if line.startswith(begin):
                return seen
        raise AssertionError("".join(seen))

    def run(words, *, kill_after=None, saves_in=None):
        before = saved(saves_in)
        launcher.stdin.write(json.dumps(words) + "\n")
        launcher.stdin.flush()
        pid = int(until("started ")[-1].split()[1])
        if kill_after is not None:
            end = time.monotonic() + 60
            while saves_in is not None and saved(saves_in) == before and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        seen = until("ended ")
        assert seen[-1] == f"ended {0 if kill_after is None else int(signal.SIGKILL)}\n", "".join(seen)

    yield run
    launcher.communicate(timeout=30)
    assert launcher.returncode == 0


def saved(run):
    """The step of the newest checkpoint."""
    found = checkpoints_in(run) if run is not None and run.exists() else []
    return int(found[-1].name.rpartition("-")[2]) if found else 0


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tiny_model, rows, launched, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    launched(command(tiny_model, rows, whole)[3:])
    randomness = random.Random(0)
    for kill in range(KILLS):
        resume = ["--resume_from_checkpoint", str(run)] if (run / "args.json").exists() else []
        words = command(tiny_model, rows, run, *resume)[3:]
        # Every seventh is killed while it starts.
        launched(words, kill_after=randomness.uniform(0, LEFT_S), saves_in=None if kill % 7 == 6 else run)
    assert STEPS > saved(run) >= 2 * KILLS  # they went on from one another
    launched(command(tiny_model, rows, run, "--resume_from_checkpoint", str(run))[3:])
    wanted, found = (load_file(checkpoints_in(place)[-1] / "adapter_model.safetensors") for place in (whole, run))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert stable(run) == stable(whole)
    assert not list(run.glob(".*.tmp"))
    audit.verify(run / "audit.jsonl")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tiny_model, rows, tmp_path):
    run = tmp_path / "run"
    env = environment(tmp_path / "cache")
    process = subprocess.Popen(
        command(tiny_model, rows, run, steps=100_000), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 8/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after step" in errors
    assert f"swift sft --resume_from_checkpoint {run} goes on" in errors
    assert checkpoints_in(run)
