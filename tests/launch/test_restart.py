"""Training through the real launcher: ranks that are killed, and a launcher that is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from swift import cli, progress
from tests.ranks import run_ranks


def command(model, rows, run):
    return [
        *["sft", "--model", str(model), "--dataset", str(rows), "--output_dir", str(run), "--add_version", "false"],
        *["--max_steps", "30", "--save_steps", "5", "--logging_steps", "1", "--learning_rate", "1e-2", "--report_to", "none"],
        *["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--report_samples", "0"],
    ]


def kill(run, attempt, rank, step):
    """SIGKILL to a rank when it has come to a step of an attempt."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        for folder in run.glob(f"launch/*/attempt-{attempt}/rank-{rank}"):
            mark = progress.read(folder / "progress")
            if mark.step is not None and mark.step >= step:
                os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
                return
        time.sleep(0.001)
    raise AssertionError(f"attempt {attempt} did not come to step {step}")


@pytest.mark.slow
@pytest.mark.multi
def test_two_killed_ranks_leave_no_trace(tiny_model, rows, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(2, cli.main, command(tiny_model, rows, whole))
    words = [
        sys.executable,
        "-m",
        "swift.cli",
        "launch",
        "--nproc_per_node",
        "2",
        "--max_restarts",
        "2",
        "--",
        *command(tiny_model, rows, run),
    ]
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with launcher:
        kill(run, 0, 1, 8)
        kill(run, 1, 0, 17)
        out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert err.count("was ended by SIGKILL in step") == 2
    assert "resuming" in out
    wanted, found = (load_file(place / "checkpoint-30" / "adapter_model.safetensors") for place in (whole, run))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    losses = [[json.loads(line).get("loss") for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (whole, run)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.multi
def test_ctrl_c_saves_and_sigkill_of_the_launcher_leaves_no_process(tiny_model, rows, tmp_path):
    run = tmp_path / "run"
    words = command(tiny_model, rows, run)
    words[words.index("30")] = "100000"
    start = [sys.executable, "-m", "swift.cli", *words]
    env = os.environ | {"NPROC_PER_NODE": "2"}
    launcher = subprocess.Popen(start, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with launcher:
        for line in launcher.stdout:
            if line.startswith("step 8/"):
                launcher.send_signal(signal.SIGINT)
                break
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert err.count("error: stopped after step") == 1
    launcher = subprocess.Popen([*start, "--resume_from_checkpoint", str(run)], env=env, stdout=subprocess.PIPE, text=True)
    with launcher:
        for line in launcher.stdout:
            if line.startswith("step "):
                break
        pids = [int(path.read_text()) for path in sorted(run.glob("launch/*"))[-1].glob("attempt-0/rank-*/pid")]
        launcher.kill()
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(pids) == 2
