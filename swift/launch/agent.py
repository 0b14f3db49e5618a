"""The processes of one machine: torch's elastic agent, which watches them our way and says what befell them.

The rendezvous, the environment of the ranks, and starting all again are torch's. Ours are: what a person sees, which rank
is blamed, how fast the others end, the watchdog, and that a second attempt goes on from the newest checkpoint.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from swift import console
from swift.launch import rank, watch
from swift.launch.failure import INTERRUPTED, Ending, MemoryEvents, RankFailed, ending_of, explain, first_cause, may_restart
from swift.launch.logs import Follower, Logs

GRACE_S = 3.0  # how long the others have to fail by themselves, and so to leave their errors, after one failed
STOP_S = 5.0  # and after a second Ctrl-C
RESUME_KEY = "swift/resume"


class Agent(LocalElasticAgent):
    """Starts the ranks of this machine, until all have ended well, or one has failed for the last time: then RankFailed."""

    def __init__(self, spec: WorkerSpec, logs: Logs, *, hang_timeout: float) -> None:
        super().__init__(spec, logs, start_method="spawn")
        self.logs, self.hang_timeout = logs, hang_timeout
        self.memory = MemoryEvents()
        self.pids: dict[int, int] = {}  # by rank
        self._ended: dict[int, Ending] = {}
        self._followers: list[Follower] = []
        self._stops = 0
        self._kill_at: float | None = None
        self._next_look = 0.0

    def start(self) -> None:
        """Run to the end. Raises RankFailed; KeyboardInterrupt if it is stopped before there are ranks."""
        # torch's handlers end the ranks at once; ours let them save. One has to be left to torch.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            self.run()
        finally:
            self._kill_all()
            self._stop_following()
            for number, handler in old.items():
                signal.signal(number, handler)

    # What torch calls

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.logs.resume = self._agree_on_resume(worker_group)
        found: dict[int, Any] = super()._start_workers(worker_group)
        self.pids = {worker.global_rank: found[worker.local_rank] for worker in worker_group.workers}
        self._ended = {}
        for number, pid in self.pids.items():
            (self.logs.rank(number) / "pid").write_text(str(pid))
        if 0 in self.pids:
            folder, until = self.logs.rank(0), rank.MARKER.format(rank=0)
            self._followers = [
                Follower(folder / "out.log", sys.stdout),
                Follower(folder / "err.log", sys.stderr, until=until),
            ]
        return found

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Before the machines start all again, also when another has asked for it."""
        self._kill_all()
        self._stop_following()
        super()._stop_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._look()
        failed = [ending for ending in self._ended.values() if ending.code != 0]
        if failed:
            return self._after_failure(worker_group.workers[0].world_size)
        if len(self._ended) == len(self.pids):
            self._stop_following()
            self._kill_all()  # what they left behind
            succeeded: RunResult = super()._monitor_workers(worker_group)
            return succeeded
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._kill_all()
        elif self.hang_timeout and time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + min(1.0, self.hang_timeout / 4)
            alive = [watch.Watched(number, pid, self.logs.rank(number)) for number, pid in self.pids.items() if number not in self._ended]
            seconds = watch.seconds_still(alive, time.monotonic())
            if seconds > self.hang_timeout:
                problem = RankFailed(watch.report(alive, seconds), hint=f"the whole logs of all ranks are in {self.logs.folder}")
                self._kill_all()
                return self._again_or_raise(problem, is_worth_it=True)
        return RunResult(state=WorkerState.HEALTHY)

    # Ours

    def _agree_on_resume(self, worker_group: WorkerGroup) -> str | None:
        """The run with which all machines go on: what the first of them knows that knows one. A new machine does not."""
        known = rank.run_to_resume(self.logs.run_file)
        if worker_group.group_world_size == 1:
            return known
        key = f"{RESUME_KEY}/{self.logs.attempt + 1}" if worker_group.spec.rdzv_handler.get_backend() == "static" else RESUME_KEY
        store: Any = worker_group.store
        store.set(f"{key}/{worker_group.group_rank}", known or "")
        told = (store.get(f"{key}/{number}").decode() for number in range(worker_group.group_world_size or 1))
        agreed: str | None = next(filter(None, told), None)
        if agreed and not known:
            self.logs.run_file.write_text(agreed, encoding="utf-8")
        return agreed

    def _look(self) -> None:
        """See which ranks have ended. They are left to torch to be waited for."""
        for number, pid in self.pids.items():
            if number in self._ended:
                continue
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                self._ended[number] = ending_of(number, code, time.time(), self.logs.rank(number), was_ended=self._is_killing)

    _is_killing = False

    def _kill_all(self) -> None:
        """End what is left of the ranks and of what they started, at once, and let go of their logs."""
        self._is_killing = True
        for handler in self._pcontext.subprocess_handlers.values() if isinstance(self._pcontext, SubprocessContext) else ():
            with contextlib.suppress(ProcessLookupError):
                handler.close(signal.SIGKILL)  # of the whole process group of the rank
        self._wait(lambda: False, 10)
        self._is_killing = False

    def _wait(self, is_over: Callable[[], bool], seconds: float) -> None:
        """Look until all ranks have ended, or so many seconds are over, or ``is_over``."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ChildProcessError):  # torch has waited for them
                self._look()
            if len(self._ended) == len(self.pids) or is_over() or time.monotonic() > end:
                return
            time.sleep(0.02)

    def _after_failure(self, size: int) -> RunResult:
        """Let the others end, then start all again or raise."""
        if self._stops or any(ending.code == INTERRUPTED for ending in self._ended.values()):
            # They stop after their step and save, which takes as long as it takes: to the next Ctrl-C.
            self._wait(lambda: self._kill_at is not None and time.monotonic() > self._kill_at, float("inf"))
        else:
            self._wait(lambda: False, GRACE_S)
        self._kill_all()
        if self._kill_at is not None:  # who has to be killed to end was told to
            raise RankFailed("interrupted", hint="nothing was saved of the step that was going on", exit_code=INTERRUPTED)
        endings = list(self._ended.values())
        problem = explain(endings, size, self.logs.folder, self.memory)
        return self._again_or_raise(problem, is_worth_it=may_restart(first_cause(endings)) and not self._stops)

    def _again_or_raise(self, problem: RankFailed, *, is_worth_it: bool) -> RunResult:
        self._stop_following()
        if not is_worth_it or self._remaining_restarts == 0:
            raise problem
        console.error(problem)
        known, left = rank.run_to_resume(self.logs.run_file), self._remaining_restarts - 1
        # Another machine may know the run: they agree when they meet again.
        unknown = "the beginning" if self._worker_group.group_world_size == 1 else "what another machine knows"
        where = f"the newest checkpoint of {known}" if known else unknown
        console.notice(f"starting all ranks again, from {where}; restarts left after this one: {left}")
        return RunResult(state=WorkerState.FAILED)

    def _stop_following(self) -> None:
        for follower in self._followers:
            follower.stop()
        self._followers = []

    def _on_signal(self, number: int, frame: Any) -> None:
        """Ask the ranks to stop after their step, as Ctrl-C asks a single process; a second time at once."""
        self._stops += 1
        if not self.pids or len(self._ended) == len(self.pids):
            raise KeyboardInterrupt
        if self._stops > 1:
            self._kill_at = min(self._kill_at or float("inf"), time.monotonic() + STOP_S)
        for each, pid in self.pids.items():
            if each not in self._ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
