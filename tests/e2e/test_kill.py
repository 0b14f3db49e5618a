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
STEPS = 240  # a killed run adds a few till its first line, and what it does in LEFT_S
LEFT_S = 0.12


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
    """Runs a command to its end, or kills it some seconds after its start or its first step."""
    env = environment(tmp_path / "cache")
    words = [sys.executable, "-u", "-c", LAUNCHER]
    launcher = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(words, *, kill_after=None, awaits_step=False):
        launcher.stdin.write(json.dumps(words) + "\n")
        launcher.stdin.flush()
        seen, pid = [], None
        for line in launcher.stdout:
            seen.append(line)
            if line.startswith("started "):
                pid = int(line.split()[1])
            if line.startswith("ended "):
                assert kill_after is None and line == "ended 0\n", "".join(seen)
                return
            if kill_after is not None and pid is not None and (not awaits_step or any(line.startswith("step ") for line in seen)):
                break
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
        last = next(line for line in launcher.stdout if line.startswith("ended "))
        assert last == f"ended {signal.SIGKILL}\n", "the run was over before it could be killed"

    yield run
    launcher.communicate(timeout=30)
    assert launcher.returncode == 0


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tiny_model, rows, launched, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    launched(command(tiny_model, rows, whole)[3:])
    randomness = random.Random(0)
    for kill in range(KILLS):
        resume = ["--resume_from_checkpoint", str(run)] if (run / "args.json").exists() else []
        words = command(tiny_model, rows, run, *resume)[3:]
        launched(words, kill_after=randomness.uniform(0, LEFT_S), awaits_step=kill % 7 != 6)  # every seventh is killed while it starts
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
