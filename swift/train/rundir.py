"""The run directory: where it is, who holds it, what lies in it."""

import fcntl
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from swift.errors import CheckpointError, MachineError
from swift.files import explain_os_errors

STATE_FILE = "trainer_state.json"
ARGS_FILE = "args.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunDirectory:
    """A directory that one run owns while it goes on. Use as a context manager: it is locked inside the block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    def __enter__(self) -> "RunDirectory":
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise MachineError(f"{self.path} is in use by a run that is going on", hint="wait for it, or choose another --output_dir") from None
        for remains in self.path.glob(".*.tmp"):
            shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
        return self

    def __exit__(self, *_: object) -> None:
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


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints in ``run`` by step; a folder without its state file was not written to the end by us."""
    found = []
    if run.is_dir():
        for path in run.iterdir():
            match = _CHECKPOINT.fullmatch(path.name)
            if match and not path.is_symlink() and path.is_dir():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(place: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """(run directory, checkpoint) that ``place`` names: a checkpoint, or a run, whose newest checkpoint is meant.

    The checkpoint is None for a run that has none yet. Raises CheckpointError if ``place`` is neither.
    """
    path = Path(place)
    if not path.is_dir():
        raise CheckpointError(f"there is no run directory or checkpoint {place}", hint="swift runs list shows the runs")
    if _CHECKPOINT.fullmatch(path.resolve().name):
        return path.resolve().parent, path.resolve()
    found = checkpoints_in(path)
    if found:
        return path, found[-1]
    if (path / ARGS_FILE).is_file():
        return path, None
    versions = sorted((p for p in path.glob("v*-*") if (p / ARGS_FILE).is_file()), key=lambda p: (p.stat().st_mtime, p.name))
    if versions:
        return find_checkpoint(versions[-1])
    raise CheckpointError(f"{place} holds no run", hint="name a run directory (it has an args.json) or a checkpoint-N in it")


def best_checkpoint(place: str | os.PathLike[str]) -> Path:
    """The checkpoint that a later command takes when it is given ``place``: the newest, or the one named."""
    run, checkpoint = find_checkpoint(place)
    if checkpoint is None:
        raise CheckpointError(f"the run {run} has no checkpoint yet", hint=f"swift sft --resume_from_checkpoint {run} goes on with it")
    return checkpoint
