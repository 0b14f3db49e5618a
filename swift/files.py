"""Writing files so that nobody ever finds half of one."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swift.errors import MachineError, SwiftError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_os_errors(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` (which must not exist) when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explain_os_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission) into a MachineError that names ``path``."""
    try:
        yield
    except OSError as problem:
        raise machine_error(problem, path) from problem
    except SwiftError:
        raise  # it says already what happened
    except Exception as problem:
        # torch raises a RuntimeError over the system's error, safetensors an error class of its own with its text inside.
        below: BaseException | None = problem
        while below is not None:
            if isinstance(below, OSError):
                raise machine_error(below, path) from problem
            below = below.__context__
        if "No space left" in str(problem):
            raise machine_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path) from problem
        raise


def machine_error(problem: OSError, path: Path) -> MachineError:
    hints = {
        errno.ENOSPC: "free some space, or choose another place",
        errno.EACCES: "change its permissions, or choose another place",
        errno.EROFS: "choose a place where you may write",
    }
    return MachineError(f"{path}: {problem.strerror or problem}", hint=hints.get(problem.errno or 0))


def reserve(descriptor: int, size: int) -> None:
    """Take ``size`` bytes of the disk for an open file, where the system can: a full disk is found before anything is computed."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as problem:
            if problem.errno == errno.ENOSPC:
                raise


def visible_files(folder: Path) -> list[Path]:
    """All files below ``folder`` outside of hidden files and folders, sorted; MachineError if a part may not be read."""

    def refuse(problem: OSError) -> None:
        raise machine_error(problem, Path(problem.filename or folder)) from problem

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for name in names if not name.startswith(".") and (path := Path(parent, name)).is_file()]
    return sorted(found)


def save_torch(path: Path, value: Any) -> None:
    """torch.save through a Python file, whose errors say what the system said (torch's own writer hides a full disk)."""
    import torch

    with new_file(path) as temporary, temporary.open("wb") as file:
        torch.save(value, file)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder ``new`` in the place of ``target``, which may be absent. A kill at any moment leaves one of both whole.

    Between two renames the old one has a hidden name, from which ``give_back`` returns it.
    """
    aside = _aside(target)
    _remove(aside)
    if target.exists() or target.is_symlink():
        os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        give_back(target)
        raise
    sync(target.parent)
    _remove(aside)


def give_back(target: Path) -> None:
    """After a replacement that was killed half way: the old folder in its place again."""
    aside = _aside(target)
    if (aside.exists() or aside.is_symlink()) and not (target.exists() or target.is_symlink()):
        os.rename(aside, target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
