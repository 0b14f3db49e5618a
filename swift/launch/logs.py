"""Where the output of ranks goes: a folder for each rank of each attempt, and rank 0 on the terminal as well."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from swift import progress
from swift.files import explain_os_errors
from swift.launch import rank

RUN, JOB = "run", "slurm-job"  # files of a launch: the run directory, the number of the job
FOLLOW_S = 0.1  # how often the terminal is brought up to date


def new_folder_of_launch(parent: Path) -> Path:
    """A new folder PARENT/YYYYMMDD-HHMMSS for what the ranks of one launch leave."""
    name = time.strftime("%Y%m%d-%H%M%S")
    with explain_os_errors(parent):
        for number in range(1000):
            folder = parent / (name if number == 0 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder.absolute()
            except FileExistsError:
                continue
    raise AssertionError(f"a thousand launches in one second in {parent}")


def take_up_job(folder: Path, parent: Path, environment: Mapping[str, str] | None = None) -> None:
    """Leave in ``folder`` which job of Slurm this is, and the run of that job, if Slurm starts it again and ``parent`` knows the run.

    Slurm does so after preemption, and when a machine broke down (SLURM_RESTART_COUNT); the run goes on from its newest checkpoint.
    """
    env = os.environ if environment is None else environment
    job = env.get("SLURM_JOB_ID")
    if not job:
        return
    (folder / JOB).write_text(job, encoding="utf-8")
    if env.get("SLURM_RESTART_COUNT", "0") == "0":
        return
    same = [path.parent / RUN for path in parent.glob(f"**/{JOB}") if path.read_text(encoding="utf-8") == job]
    known = sorted((path for path in same if path.is_file()), key=lambda path: path.stat().st_mtime)
    if known:
        (folder / RUN).write_bytes(known[-1].read_bytes())


class Logs(LogsSpecs):
    """LAUNCH/attempt-A/rank-R/ with out.log, err.log, error.json, stacks.txt and the marks of progress."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.run_file = folder / RUN
        self.attempt = -1
        self.resume: str | None = None

    def rank(self, number: int) -> Path:
        """The folder of a rank in this attempt."""
        return self.folder / f"attempt-{self.attempt}" / f"rank-{number}"

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called by torch before each attempt, with the environment of each local rank, which it may extend."""
        self.attempt += 1
        found = LogsDest()
        for local_rank, env in envs.items():
            place = self.rank(int(env["RANK"]))
            with explain_os_errors(place):
                place.mkdir(parents=True)
                progress.create(place / "progress")
            env |= {
                rank.FOLDER: str(place),
                rank.PARENT: str(os.getpid()),
                progress.FILE_VARIABLE: str(place / "progress"),
                progress.RUN_VARIABLE: str(self.run_file),
                "TORCHELASTIC_ERROR_FILE": str(place / "error.json"),
                "PYTHONUNBUFFERED": "1",
                # The flight recorder of NCCL: kept, written when the watchdog asks through the pipe, and when NCCL gives up.
                "TORCH_FR_BUFFER_SIZE": "2000",
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
                "TORCH_FR_DUMP_TEMP_FILE": str(place / "flight-"),
                "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(place / "flight-pipe-"),
            }
            if self.resume:
                env[rank.RESUME] = self.resume
            found.stdouts[local_rank] = str(place / "out.log")
            found.stderrs[local_rank] = str(place / "err.log")
            found.error_files[local_rank] = str(place / "error.json")
        return found


class Follower:
    """Brings what is written to a file to a stream, until it is stopped or a line says that the launcher speaks from there on."""

    def __init__(self, path: Path, stream: TextIO, *, until: str | None = None) -> None:
        self._path, self._stream, self._until = path, stream, until
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"follow {path.name}")
        self._thread.start()

    def stop(self) -> None:
        """Return when all that was written so far is on the stream."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        with self._path.open("rb") as file:
            is_last = False
            while not is_last:
                is_last = self._stopped.wait(FOLLOW_S)
                # An unfinished line waits for its end, unless nothing more will come.
                while line := file.readline():
                    if not line.endswith(b"\n") and not is_last:
                        file.seek(-len(line), os.SEEK_CUR)
                        break
                    text = line.decode(errors="replace")
                    if self._until is not None and text.rstrip("\n").endswith(self._until):  # torch puts "[rank0]: " before it
                        return
                    self._stream.write(text)
                self._stream.flush()


def tail(path: Path, count: int = 20) -> list[str]:
    """The last ``count`` lines of a file that are not empty; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]
