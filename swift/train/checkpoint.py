"""Checkpoints: written whole or not at all, loaded by peft and transformers, enough to resume bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import torch

from swift import audit
from swift.errors import CheckpointError
from swift.files import explain_os_errors, new_folder, save_torch, sha256_file, write_json
from swift.model.checkpoints import ARGS_FILE
from swift.parallel.base import Strategy
from swift.train.rundir import STATE_FILE, RunDirectory
from swift.train.state import TrainState, read_state
from swift.tuner.base import Tuner

OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "scheduler.pt"


def save_checkpoint(
    run: RunDirectory,
    *,
    model: Any,
    tokenizer: Any,
    tuner: Tuner,
    strategy: Strategy,
    schedule: Any,
    state: TrainState,
    args: dict[str, Any],
    max_shard_size: str,
    only_model: bool,
) -> Path:
    """Write checkpoint-STEP and record its digest in the audit; an existing one of that step is kept."""
    path = run / f"checkpoint-{state.global_step}"
    if path.exists():
        return path
    with new_folder(path) as folder:
        tuner.save(model, folder, max_shard_size=max_shard_size)
        if not (folder / "adapter_config.json").exists():
            tokenizer.save_pretrained(folder)
        if not only_model:
            strategy.save(folder / OPTIMIZER_FILE)
            save_torch(folder / SCHEDULE_FILE, schedule.state_dict())
        write_json(folder / STATE_FILE, state.to_json())
        write_json(folder / ARGS_FILE, args)
    weights = {file.name: sha256_file(file) for file in sorted(path.glob("*.safetensors"))}
    audit.append(run / "audit.jsonl", "checkpoint", {"checkpoint": path.name, "sha256": weights})
    return path


def load_checkpoint(path: Path, *, model: Any, tuner: Tuner, strategy: Strategy, schedule: Any) -> TrainState:
    """Put the state of ``path`` into model, optimizer and schedule; CheckpointError if it cannot be resumed."""
    if not (path / OPTIMIZER_FILE).is_file():
        raise CheckpointError(
            f"{path} holds no optimizer state: it was saved with --save_only_model", hint="--resume_only_model true takes its weights"
        )
    state = read_state(path / STATE_FILE)
    tuner.load(model, path)
    strategy.load(path / OPTIMIZER_FILE)
    schedule.load_state_dict(torch.load(path / SCHEDULE_FILE, weights_only=True))
    return state


def prune(run: RunDirectory, keep: int, *, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond ``keep``; the newest and the best stay."""
    found = run.checkpoints()
    protected = {found[-1].name, f"checkpoint-{best_step}"} if found else set()
    removable = [path for path in found if path.name not in protected]
    for path in removable[: max(0, len(found) - keep)]:
        with explain_os_errors(path):
            doomed = path.with_name(f".{path.name}.old.tmp")  # renamed first: a kill here leaves no half checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)


def link(run: RunDirectory, name: str, checkpoint: str) -> None:
    """Point the symbolic link ``name`` in the run directory at a checkpoint."""
    temporary = run / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint)
    temporary.replace(run / name)
