"""What the watchdog reads, and what the launcher says of memory, from files; one real hang of two gloo processes."""

import json
import os
import pickle
import signal
import time
from pathlib import Path

import pytest

from swift import progress
from swift.errors import DataError
from swift.launch import rank, watch
from swift.launch.failure import MemoryEvents, ending_of, explain, first_cause
from tests.ranks import run_ranks

# As faulthandler of Python 3.11 wrote it for a rank of a gloo run, paths shortened.
STACK = """Thread 0x00007f0bb1 (most recent call first):
  File "/lib/threading.py", line 331 in wait

Current thread 0x00007f0bc8 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/swift/parallel/world.py", line 85 in add
  File "/swift/train/loop.py", line 52 in train_step
"""


@pytest.fixture
def slot(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_slot", None)
    progress.create(tmp_path / "progress")
    progress.open_slot(tmp_path / "progress")
    return tmp_path / "progress"


def test_a_mark_is_read_by_another_process(slot):
    assert progress.read(slot).count == 0
    progress.mark(step=12, phase="forward and backward")
    progress.mark(phase="clip and step")
    mark = progress.read(slot)
    assert (mark.count, mark.step, mark.phase) == (2, 12, "clip and step")
    assert time.monotonic() - mark.at < 5


def test_a_mark_costs_next_to_nothing(slot):
    def seconds():
        begin = time.thread_time()
        for _ in range(10_000):
            progress.mark(step=1, phase="forward and backward")
        return (time.thread_time() - begin) / 10_000

    assert min(seconds() for _ in range(5)) < 5e-6  # 0.4 us on a quiet 2-core EPYC


def test_what_may_take_any_time_is_not_watched(slot):
    watched = [watch.Watched(0, os.getpid(), slot.parent)]
    progress.mark(step=3, phase="add")
    assert watch.seconds_still(watched, time.monotonic() + 100) > 99
    progress.unwatch("report")
    assert watch.seconds_still(watched, time.monotonic() + 100) == 0


def test_without_a_launcher_marks_do_nothing(monkeypatch):
    monkeypatch.setattr(progress, "_slot", None)
    progress.mark(step=1, phase="x")
    progress.unwatch("y")


def test_the_collective_is_named_by_the_stack():
    place = watch.place_of(STACK)
    assert place.collective == "all_reduce"
    assert place.text == "waits in all_reduce, called from /swift/parallel/world.py:85 in add"


def test_the_last_collective_of_a_flight_record_is_named(tmp_path):
    entry = {"profiling_name": "nccl:all_gather", "collective_seq_id": 57, "state": "started", "input_sizes": [[4, 8]]}
    (tmp_path / "flight-0").write_bytes(pickle.dumps({"entries": [entry]}))
    assert watch.flight_record(tmp_path) == "last collective: nccl:all_gather, number 57, started, [[4, 8]]"


def test_torchrun_is_told_what_a_person_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    rank.fail(DataError("rows.jsonl does not exist", hint="did you mean row.jsonl?"))
    said = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert said == "rows.jsonl does not exist\nhint: did you mean row.jsonl?"


def test_a_launcher_that_passes_a_signal_on_does_not_ask_twice():
    from swift.train.loop import StopRequest

    said = []
    with StopRequest(lambda: said.append("stopping")) as stop:
        assert not stop.is_set
        signal.raise_signal(signal.SIGINT)  # of the terminal
        signal.raise_signal(signal.SIGTERM)  # of the launcher, which had it too
        assert stop.is_set
        for number in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert said == ["stopping"]


def one_does_not_come(folder):
    """Rank 1 never calls the collective in which rank 0 waits."""
    import torch
    from torch import distributed as dist

    from swift.parallel.world import join

    number = int(os.environ["RANK"])
    own = Path(folder) / f"rank-{number}"
    own.mkdir()
    progress.create(own / "progress")
    os.environ |= {rank.FOLDER: str(own), rank.PARENT: str(os.getppid()), progress.FILE_VARIABLE: str(own / "progress")}
    rank.enter(["sft"])
    with join(torch.device("cpu")):
        progress.mark(step=5 + (number == 0), phase="add")
        (own / "pid").write_text(str(os.getpid()))
        if number == 0:
            dist.all_reduce(torch.ones(1))
        while not (Path(folder) / "reported").exists():
            time.sleep(0.02)
        if number == 1:
            dist.all_reduce(torch.ones(1))


@pytest.mark.multi
def test_a_rank_that_does_not_come_to_a_collective_is_named(tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            run_ranks(2, one_does_not_come, str(tmp_path))
            os._exit(0)
        finally:
            os._exit(1)
    ranks = []
    end = time.monotonic() + 60
    while len(ranks) < 2 and time.monotonic() < end:
        found = sorted(tmp_path.glob("rank-*/pid"))
        ranks = [watch.Watched(number, int(path.read_text()), path.parent) for number, path in enumerate(found) if path.read_text()]
        time.sleep(0.05)
    time.sleep(0.5)  # rank 0 is in its collective
    report = watch.report(ranks, watch.seconds_still(ranks, time.monotonic()))
    (tmp_path / "reported").touch()
    assert os.waitpid(pid, 0)[1] == 0
    lines = report.splitlines()
    assert lines[0].endswith(": rank 1 did not come to where the others wait")
    assert "rank 0: step 6, add, for" in lines[1]
    assert "waits in all_reduce, called from" in lines[1]
    assert "rank 1: step 5, add, for" in lines[2]
    assert "in one_does_not_come" in lines[2]


def failed(tmp_path, code=-signal.SIGKILL):
    return ending_of(1, code, time.time(), tmp_path)


def test_memory_is_blamed_by_what_the_kernel_counts(tmp_path):
    group = tmp_path / "cgroup" / "jobs"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("oom 0\noom_kill 1\n")
    (tmp_path / "own").write_text("0::/jobs\n")
    memory = MemoryEvents(tmp_path / "cgroup", tmp_path / "kmsg", tmp_path / "own")
    assert "out of memory is likely" in memory.explain(None)
    (group / "memory.events").write_text("oom 1\noom_kill 2\n")
    assert (
        memory.explain(None) == f"out of memory: the kernel killed 1 process(es) for it meanwhile (oom_kill in {group / 'memory.events'})"
    )
    assert "out of memory: the kernel killed 1" in explain([failed(tmp_path)], 2, tmp_path, memory).message


def test_memory_is_blamed_by_what_the_kernel_wrote(tmp_path):
    (tmp_path / "kmsg").write_text("6,1,2,-;usb\n3,900,77,-;Out of memory: Killed process 4711 (python) total-vm:9kB\n")
    memory = MemoryEvents(tmp_path, tmp_path / "kmsg", tmp_path / "none")
    assert memory.explain(4711) == "out of memory: the kernel wrote 'Out of memory: Killed process 4711 (python) total-vm:9kB'"
    assert "out of memory is likely" in memory.explain(47)


def test_an_abort_by_the_watchdog_of_nccl_is_not_the_cause(tmp_path):
    abort, killed = ending_of(0, -signal.SIGABRT, 1.0, tmp_path), ending_of(3, -signal.SIGKILL, 2.0, tmp_path)
    assert first_cause([abort, killed]).rank == 3
    assert first_cause([abort]).rank == 0
