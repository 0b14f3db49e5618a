"""The run directory: where it is, who holds it, what lies in it."""

import fcntl
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from swift import progress
from swift.errors import CheckpointError, MachineError
from swift.files import explain_os_errors
from swift.model.checkpoints import checkpoints_in
from swift.parallel.world import World

STATE_FILE = "trainer_state.json"


class RunDirectory:
    """A directory that one run owns while it goes on. Use as a context manager: it is locked inside the block.

    One of the run's processes ``owns`` it; the others know where it is.
    """

    def __init__(self, path: Path, *, owns: bool = True) -> None:
        self.path = path
        self.owns = owns
        self._lock: Any = None

    def __enter__(self) -> "RunDirectory":
        if not self.owns:
            progress.tell_run(self.path)
            return self
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise MachineError(
                f"{self.path} is in use by a run that is going on", hint="wait for it, or choose another --output_dir"
            ) from None
        for remains in self.path.glob(".*.tmp"):
            shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
        progress.tell_run(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoints_in(self.path)


def new_run_path(output_dir: Path, *, add_version: bool) -> Path:
    """``output_dir`` itself, or a new vN-YYYYMMDD-HHMMSS in it, as ms-swift names them."""
    if not add_version:
        if checkpoints_in(output_dir):
            raise CheckpointError(
                f"{output_dir} holds a finished or interrupted run",
                hint=f"--resume_from_checkpoint {output_dir} goes on with it; or choose another --output_dir",
            )
        return output_dir
    numbers = [int(match[1]) for path in output_dir.glob("v*-*") if (match := re.fullmatch(r"v(\d+)-\d{8}-\d{6}", path.name))]
    return output_dir / f"v{max(numbers, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_agreed(world: World, checkpoint: Path | None) -> None:
    """CheckpointError, in every process, if they have not found the same ``checkpoint`` to go on from."""
    found = world.gather(None if checkpoint is None else checkpoint.name)
    if len(set(found)) > 1:
        other = next(rank for rank, name in enumerate(found) if name != found[0])
        raise CheckpointError(
            f"rank 0 goes on from {found[0]}, and rank {other} from {found[other]}", hint="put the run on a disk that all machines see"
        )


def check_shared(run: RunDirectory, world: World, device: torch.device, *, patience_s: float = 10) -> None:
    """MachineError, in every process, if some process does not see ``run``: each writes its parts of a checkpoint into it."""
    if world.is_alone:
        return
    world.barrier()
    end = time.monotonic() + patience_s  # a network disk may show it later
    while not (is_there := (run / ".lock").exists()) and time.monotonic() < end:
        time.sleep(0.1)
    if world.any(not is_there, device):
        raise MachineError(f"{run.path} is not on a disk that all processes see", hint="choose another --output_dir")
