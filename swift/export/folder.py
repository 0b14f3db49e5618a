"""The folder of an export: it appears whole or not at all, takes the place of another only then, and one process writes it."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from swift import console
from swift.errors import ConfigError, DataError, DependencyError, HubError, MachineError
from swift.files import explain_os_errors, give_back, replace_folder, sync

REPORT_FILE = "swift_report.json"
MODEL_FILES = (REPORT_FILE, "config.json", "merge.json")  # a folder without any of these is no export, and never replaced


def partial_folder(target: Path) -> Path:
    """Where ``target`` is written until it is whole."""
    return target.with_name(f".{target.name}.partial")


def merged_folder(target: Path) -> Path:
    """Where the merged model is that ``target`` is made of; it vanishes when ``target`` is there."""
    return target.with_name(f".{target.name}.merged")


def refuse_target(target: Path, *, exist_ok: bool, keep: Iterable[Path]) -> None:
    """ConfigError if ``target`` is taken, or if replacing it would take away what is in ``keep``, or what is no model."""
    if not target.name or target.resolve() == Path.cwd():
        raise ConfigError(f"{target} cannot be replaced: a new folder takes the place of --output_dir", hint="name a folder to be made")
    if not (target.exists() or target.is_symlink()) or (target.is_dir() and not any(target.iterdir())):
        return
    if not exist_ok:
        raise ConfigError(f"{target} exists", hint="choose another --output_dir, or say --exist_ok true to replace it")
    if not target.is_dir():
        raise ConfigError(f"{target} is a file", hint="choose another --output_dir")
    place = target.resolve()
    for path in (*keep, Path.cwd(), Path.home()):
        if path.resolve().is_relative_to(place):
            raise ConfigError(f"--exist_ok true would replace {target}, which holds {path}", hint="choose another --output_dir")
    if not any((target / name).is_file() for name in MODEL_FILES):
        raise ConfigError(f"{target} holds other things than a model: it is not replaced", hint="choose another --output_dir")


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Within the block no other process writes ``target``; parents that were made for nothing vanish again.

    MachineError if another process does, or if the place cannot be written to. What a kill between two renames has hidden is
    there again: only who holds the claim can tell that from a replacement under way.
    """
    missing = [parent for parent in target.absolute().parents if not parent.exists()]
    lock = target.with_name(f".{target.name}.lock")
    with explain_os_errors(target):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    if not _locked(file, lock):
        file.close()
        raise MachineError(f"{target} is being written by another process", hint="wait for it, or choose another --output_dir")
    try:
        with explain_os_errors(target):
            give_back(target)
        shutil.rmtree(merged_folder(target), ignore_errors=True)  # remains of a process that was killed
        yield
    finally:
        shutil.rmtree(merged_folder(target), ignore_errors=True)
        lock.unlink(missing_ok=True)
        file.close()
        for parent in missing:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


@contextlib.contextmanager
def whole_folder(target: Path, *, resumes: bool = False) -> Iterator[Path]:
    """A folder that becomes ``target``, in place of one that is there, when the block ends well, and vanishes otherwise.

    With ``resumes`` what a killed or interrupted run left is given again, and an interruption leaves it; so does a mistake in
    the next command line, which must not cost the work of hours.
    """
    temporary = partial_folder(target)
    was_there = resumes and temporary.exists()
    if not resumes:
        shutil.rmtree(temporary, ignore_errors=True)
    is_kept = False
    try:
        with explain_os_errors(target):
            temporary.mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            replace_folder(temporary, target)
    except KeyboardInterrupt:
        is_kept = resumes and temporary.exists()
        raise
    except (ConfigError, DataError, HubError, DependencyError):
        is_kept = was_there
        raise
    finally:
        if is_kept:
            console.notice(f"the same command as before goes on where it was; what is done lies in {temporary}")
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def _locked(file: TextIO, path: Path) -> bool:
    """Whether this process holds the lock ``file``, and ``path`` is still its name: who is done removes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
