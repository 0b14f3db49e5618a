"""Where checkpoints are: in a run directory, in the newest run below a folder, or named themselves."""

import os
import re
from pathlib import Path

from swift.errors import CheckpointError

ARGS_FILE = "args.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoints_in(run: Path) -> list[Path]:
    """Whole checkpoints in ``run``, oldest first. Half-written ones have other names until they are done."""
    found = []
    if run.is_dir():
        for path in run.iterdir():
            match = CHECKPOINT.fullmatch(path.name)
            if match and not path.is_symlink() and path.is_dir():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(place: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """(run directory, checkpoint) that ``place`` names: a checkpoint, or a run, whose newest checkpoint is meant.

    A folder of runs means its newest run. The checkpoint is None for a run that has none yet.
    Raises CheckpointError if ``place`` is none of these.
    """
    path = Path(place)
    if not path.is_dir():
        raise CheckpointError(f"there is no run directory or checkpoint {place}", hint="swift runs list shows the runs")
    if CHECKPOINT.fullmatch(path.resolve().name):
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


def newest_checkpoint(place: str | os.PathLike[str]) -> Path:
    """The checkpoint that ``place`` names, or the newest of the run it names; CheckpointError if there is none."""
    run, checkpoint = find_checkpoint(place)
    if checkpoint is None:
        raise CheckpointError(f"the run {run} has no checkpoint yet", hint=f"swift sft --resume_from_checkpoint {run} goes on with it")
    return checkpoint


def adapter_folder(place: str) -> Path:
    """The folder with an adapter that ``place`` names: itself, a checkpoint, or a run's newest checkpoint."""
    path = Path(place)
    if (path / "adapter_config.json").is_file():
        return path
    found = newest_checkpoint(path)
    if not (found / "adapter_config.json").is_file():
        raise CheckpointError(f"{found} holds a whole model, no adapter", hint=f"use it as --model {found}")
    return found


def model_reference(reference: str) -> str:
    """``reference``, or the newest checkpoint if it names a run directory of full fine-tuning."""
    path = Path(reference)
    if path.is_dir() and not (path / "config.json").is_file() and ((path / ARGS_FILE).is_file() or checkpoints_in(path)):
        return str(newest_checkpoint(path))
    return reference


def named_adapters(places: list[str]) -> tuple[list[str], dict[str, Path]]:
    """Of what --adapters lists: the places without a name, and the folders of those given as NAME=PLACE.

    CheckpointError for a name that is given twice, or a place without an adapter.
    """
    plain: list[str] = []
    named: dict[str, Path] = {}
    for place in places:
        name, equals, folder = place.partition("=")
        if not equals or "/" in name or Path(place).exists():
            plain.append(place)
        elif name in named:
            raise CheckpointError(f"two adapters are named {name}", hint="give each a name of its own")
        else:
            named[name] = adapter_folder(folder)
    return plain, named
