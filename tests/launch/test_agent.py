"""The launcher with ranks that need no torch: each is one small Python program, so that a launch takes half a second."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swift.config.launch import LaunchConfig
from swift.config.options import build
from swift.errors import MachineError
from swift.launch import agent, run
from swift.launch.failure import RankFailed
from swift.launch.run import launch_here
from tests.ranks import free_port, run_ranks

BEGIN = """
import os, signal, sys, time
from pathlib import Path
from swift import progress
from swift.errors import ConfigError, Interrupted
from swift.launch import rank
words = rank.enter(sys.argv[1:])
number = int(os.environ["RANK"])
def fail(problem):
    rank.fail(problem)
    sys.exit(problem.exit_code)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "GRACE_S", 0.5)

    def start(code, **options):
        config = build(LaunchConfig, ("argument", {"nproc_per_node": 2, "command": ["sft"], **options}))
        launch_here(config, log_dir=tmp_path / "launch", program=("-c", BEGIN + code))

    return start


def folder(tmp_path, attempt=0, rank=0):
    return next((tmp_path / "launch").iterdir()) / f"attempt-{attempt}" / f"rank-{rank}"


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(is_so):
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_rank_0_speaks_and_what_each_prints_is_kept(launch, tmp_path, capsys):
    launch("print('out', number); print('err', number, file=sys.stderr); print(words)", command=["sft", "--system", "a $$ b ${local_rank}"])
    out, err = capsys.readouterr()
    assert out == "out 0\n['sft', '--system', 'a $$ b ${local_rank}']\n"
    assert "err 0\n" in err
    assert "err 1" not in err
    assert str(tmp_path / "launch") in err
    assert (folder(tmp_path, rank=1) / "out.log").read_text().startswith("out 1\n")
    assert (folder(tmp_path, rank=1) / "err.log").read_text() == "err 1\n"


def test_a_killed_rank_is_named_and_the_others_end_within_seconds(launch, tmp_path):
    code = """
progress.mark(step=7, phase="forward and backward")
if number == 1:
    print("the last thing it said", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    begin = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(code)
    assert time.monotonic() - begin < 15
    assert caught.value.exit_code == 128 + 9
    first, *lines = caught.value.message.splitlines()
    assert first.startswith("rank 1 of 2 on ")
    assert first.endswith(" was ended by SIGKILL in step 7, forward and backward")
    assert "out of memory is likely" in lines[0]
    assert f"{folder(tmp_path, rank=1) / 'err.log'}" in lines[1]
    assert lines[2] == "  | the last thing it said"
    assert not is_alive(int((folder(tmp_path) / "pid").read_text()))


def test_the_rank_that_failed_first_is_blamed_and_not_those_that_waited_for_it(launch, monkeypatch):
    # Rank 0 fails in a collective, before the launcher sees that rank 1 failed at all.
    monkeypatch.setattr(agent, "GRACE_S", 10)
    code = """
if number == 1:
    time.sleep(0.5)
    raise ValueError("the cause")
code = compile("def wait(): raise RuntimeError('connection closed by peer')", "/x/torch/distributed/distributed_c10d.py", "exec")
exec(code)
wait()
"""
    with pytest.raises(RankFailed) as caught:
        launch(code)
    assert caught.value.exit_code == 1
    assert "rank 1 of 2" in caught.value.message.splitlines()[0]
    assert "ValueError: the cause" in caught.value.message
    assert "after it failed: rank 0 (RuntimeError: connection closed by peer)" in caught.value.message


def test_an_error_that_all_ranks_raise_is_said_once(launch, capsys):
    with pytest.raises(RankFailed) as caught:
        launch("fail(ConfigError('no such column', hint='name another'))")
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == ("no such column", "name another", 2)
    assert "no such column" not in capsys.readouterr().err  # the command line says it


def test_an_exit_code_without_a_word_is_passed_on(launch):
    with pytest.raises(RankFailed, match=r"rank 1 of 2 on .* ended with exit code 7\n  it has printed no error") as caught:
        launch("sys.exit(7 if number else 0)")
    assert caught.value.exit_code == 7


def test_a_restart_goes_on_with_the_run_that_rank_0_named(launch, tmp_path, capsys):
    # Killed twice; the third attempt is told both times to go on with the run.
    code = f"""
run = Path({str(tmp_path / "run")!r})
run.mkdir(exist_ok=True)
(run / "args.json").touch()
progress.tell_run(run)
print(" ".join(words))
if number == 1 and "attempt-2" not in os.environ[rank.FOLDER]:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
"""
    launch(code, max_restarts=2, command=["sft", "--adapters", "a", "--max_steps", "4"])
    out, err = capsys.readouterr()
    again = f"sft --max_steps 4 --resume_from_checkpoint {tmp_path / 'run'} --resume_only_model false --adapters"
    assert out.splitlines() == ["sft --adapters a --max_steps 4", again, again]
    assert err.count("was ended by SIGKILL") == 2
    assert f"starting all ranks again, from the newest checkpoint of {tmp_path / 'run'}" in err


def test_a_job_that_slurm_starts_again_goes_on_with_its_run(launch, monkeypatch, tmp_path, capsys):
    code = f"""
run = Path({str(tmp_path)!r}) / f"run-{{os.environ['SLURM_JOB_ID']}}"
run.mkdir(exist_ok=True)
(run / "args.json").touch()
progress.tell_run(run)
print(" ".join(words))
"""
    for job, count in (("7", "0"), ("8", "0"), ("7", "1")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        launch(code, nproc_per_node=1)
    again = f"sft --resume_from_checkpoint {tmp_path / 'run-7'} --resume_only_model false --adapters"
    assert capsys.readouterr().out.splitlines() == ["sft", "sft", again]


def one_of_two_machines(folder, port, code):
    config = {"nproc_per_node": 1, "nnodes": 2, "rdzv_endpoint": f"127.0.0.1:{port}", "max_restarts": 1, "command": ["sft"]}
    launch_here(build(LaunchConfig, ("argument", config)), log_dir=folder, program=("-c", BEGIN + code))


def test_machines_go_on_with_the_run_that_any_of_them_knows(tmp_path):
    # The machine of rank 0 is as one that was replaced: it does not know the run any more.
    code = f"""
run = Path({str(tmp_path / "run")!r})
run.mkdir(exist_ok=True)
(run / "args.json").touch()
progress.tell_run(run)
own = Path(os.environ[rank.FOLDER])
if "attempt-0" in str(own):
    (run / f"rank-{{number}}").touch()
    while not (run / f"rank-{{1 - number}}").exists():
        time.sleep(0.05)
    if number == 0:
        Path(os.environ[progress.RUN_VARIABLE]).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
(run / f"words-{{number}}").write_text(" ".join(words))
"""
    run_ranks(2, one_of_two_machines, tmp_path / "launch", free_port(), code, deadline_s=60)
    for number in (0, 1):
        assert f"--resume_from_checkpoint {tmp_path / 'run'}" in (tmp_path / "run" / f"words-{number}").read_text()


def test_wrong_input_is_not_tried_again(launch, tmp_path):
    with pytest.raises(RankFailed, match="no such column"):
        launch("fail(ConfigError('no such column'))", max_restarts=3)
    assert len(list(folder(tmp_path).parent.parent.iterdir())) == 1


def test_a_run_that_stands_still_is_ended_with_the_stack_of_each_rank(launch, tmp_path):
    code = """
progress.mark(step=5, phase="forward and backward")
def stuck():
    while True:
        time.sleep(0.2 if number else 60)
if number == 0:
    progress.mark(step=6, phase="add")
stuck()
"""
    begin = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(code, hang_timeout=1.0)
    assert time.monotonic() - begin < 15
    assert "has made progress for" in caught.value.message
    assert "rank 0: step 6, add, for" in caught.value.message
    assert "rank 1: step 5, forward and backward, for" in caught.value.message
    assert caught.value.message.count("in stuck") == 4  # each rank's place, and its stack
    assert not is_alive(int((folder(tmp_path) / "pid").read_text()))


def test_a_rank_that_goes_on_alone_is_no_hang(launch):
    launch(
        """
progress.mark(step=1, phase="save")
for _ in range(12 if number else 30):  # rank 0 must not end long before the other
    time.sleep(0.1)
    if number == 0:
        progress.mark(phase="save")
""",
        hang_timeout=0.8,
    )


def test_ctrl_c_asks_each_rank_once_and_the_launcher_waits_for_them(launch):
    code = """
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
own = Path(os.environ[rank.FOLDER])
(own / "ready").touch()
while number == 0 and not (own.parent / "rank-1" / "ready").exists():
    time.sleep(0.05)
if number == 0:
    os.kill(os.getppid(), signal.SIGINT)
while not seen:
    time.sleep(0.05)
time.sleep(0 if number else 1.5)  # rank 0 still writes its checkpoint
fail(Interrupted(f"stopped after step 3, {len(seen)} time"))
"""
    with pytest.raises(RankFailed) as caught:
        launch(code)
    assert (caught.value.message, caught.value.exit_code) == ("stopped after step 3, 1 time", 130)


def test_ctrl_c_twice_ends_ranks_that_do_not_listen(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "STOP_S", 0.3)
    code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
own = Path(os.environ[rank.FOLDER])
(own / "ready").touch()
while number == 0 and not (own.parent / "rank-1" / "ready").exists():
    time.sleep(0.05)
for _ in range(2 if number == 0 else 0):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.2)
time.sleep(60)
"""
    begin = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(code)
    assert time.monotonic() - begin < 15
    assert (caught.value.message, caught.value.exit_code) == ("interrupted", 130)


def test_a_port_in_use_and_a_machine_that_does_not_come_are_named(launch, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        several = {"nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": port}
        with pytest.raises(MachineError, match=f"the port of 127.0.0.1:{port} is in use on this machine") as caught:
            launch("", **several)
    assert "--master_port" in caught.value.hint
    meet = run.meeting_place
    monkeypatch.setattr(run, "meeting_place", lambda config: meet(config) | {"timeout": 1})
    with pytest.raises(RankFailed, match=f"the machines did not meet at 127.0.0.1:{port}: ") as failed:
        launch("", **several)
    assert (caught.value.exit_code, failed.value.exit_code) == (2, 1)  # Kubernetes tries the second again


@pytest.mark.parametrize("launcher", ["swift launch", "torchrun"])
def test_a_rank_dies_with_its_launcher(tmp_path, launcher):
    own = f'{{"SWIFT_LAUNCH_RANK": {str(tmp_path)!r}, "SWIFT_LAUNCH_PID": str(os.getpid())}}'
    rank_of_its_own = f"""
import os, subprocess, sys
env = os.environ | {{"RANK": "0"}} | {own if launcher == "swift launch" else '{"TORCHELASTIC_RUN_ID": "none"}'}
code = {BEGIN + "print(os.getpid(), flush=True); time.sleep(300)"!r}
subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True).wait()
"""
    launcher = subprocess.Popen([sys.executable, "-c", rank_of_its_own], stdout=subprocess.PIPE, text=True)
    with launcher:
        pid = int(launcher.stdout.readline())
        assert is_alive(pid)
        launcher.kill()
    wait_until(lambda: not is_alive(pid))
