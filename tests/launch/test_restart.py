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

STEPS = 60


def command(model, rows, run):
    return [
        *["sft", "--model", str(model), "--dataset", str(rows), "--output_dir", str(run), "--add_version", "false"],
        *["--max_steps", str(STEPS), "--save_steps", "5", "--logging_steps", "1", "--learning_rate", "1e-2", "--report_to", "none"],
        *["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--report_samples", "0"],
    ]


def reach(run, attempt, rank, step, *, kill=False):
    """Wait until a rank of an attempt has come to a step, and kill it then."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        for folder in run.glob(f"launch/*/attempt-{attempt}/rank-{rank}"):
            mark = progress.read(folder / "progress")
            if mark.step is not None and mark.step >= step:
                if kill:
                    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
                return
        time.sleep(0.001)
    raise AssertionError(f"attempt {attempt} did not come to step {step}")


def started(words, **env):
    start = [sys.executable, "-m", "swift.cli", *words]
    return subprocess.Popen(start, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.multi
def test_two_killed_ranks_ctrl_c_and_a_killed_launcher_leave_no_trace(tiny_model, rows, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(2, cli.main, command(tiny_model, rows, whole))
    launcher = started(["launch", "--nproc_per_node", "2", "--max_restarts", "2", "--", *command(tiny_model, rows, run)])
    with launcher:
        reach(run, 0, 0, 8, kill=True)
        reach(run, 1, 1, 17, kill=True)
        reach(run, 2, 0, 27)
        launcher.send_signal(signal.SIGINT)
        out, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 130, err
    assert err.count("was ended by SIGKILL in step") == 2
    assert err.count("error: stopped after step") == 1
    assert "resuming" in out
    launcher = started([*command(tiny_model, rows, run), "--resume_from_checkpoint", str(run)], NPROC_PER_NODE="2")
    with launcher:
        assert any(line.startswith("step ") for line in launcher.stdout), launcher.stderr.read()
        pids = [int(path.read_text()) for path in max(run.glob("launch/*")).glob("attempt-0/rank-*/pid")]
        launcher.kill()
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(pids) == 2
    left = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert left < STEPS  # it was in the middle
    run_ranks(2, cli.main, [*command(tiny_model, rows, run), "--resume_from_checkpoint", str(run)])
    wanted, found = (load_file(place / f"checkpoint-{STEPS}" / "adapter_model.safetensors") for place in (whole, run))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    losses = [[json.loads(line).get("loss") for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (whole, run)]
    assert losses[0] == losses[1]
