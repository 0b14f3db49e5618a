"""Checkpoints: written whole or not at all, loaded by peft and transformers, enough to resume bit for bit."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from swift import audit
from swift.errors import CheckpointError
from swift.files import explain_os_errors, new_folder, save_torch, sha256_file, write_json
from swift.model.checkpoints import ARGS_FILE
from swift.parallel import state as states
from swift.parallel.base import Strategy
from swift.parallel.world import World
from swift.train.rundir import STATE_FILE, RunDirectory
from swift.train.state import TrainState, read_state
from swift.tuner.base import Tuner

OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "scheduler.pt"


class Checkpoints:
    """The checkpoints of a run: each written whole or not at all, the last one perhaps while training goes on."""

    def __init__(self, run: RunDirectory, world: World, *, then: Callable[[Path], None], in_background: bool = False) -> None:
        self.run, self.world, self.in_background = run, world, in_background
        self.then = then  # what the main process does when a checkpoint is there
        self._open: contextlib.ExitStack | None = None  # the folder that has no name yet
        self._path: Path | None = None
        self._left: Any = None  # what this process is still writing

    def save(
        self,
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
        """Write checkpoint-STEP and record its digest in the audit; an existing one of that step is kept.

        Every process comes here; the main one writes all but its parts of the optimizer's state.
        """
        self.finish()
        path, world = self.run / f"checkpoint-{state.global_step}", self.world
        if world.broadcast(path.exists()):
            if world.is_main:
                self.then(path)
            return path
        with contextlib.ExitStack() as stack:
            folder = world.broadcast(stack.enter_context(new_folder(path)) if world.is_main else None)
            if strategy.shards:
                _save_whole(model, strategy, tuner, folder, max_shard_size, writes=world.is_main)
            elif world.is_main:
                tuner.save(model, folder, max_shard_size=max_shard_size)
            if not only_model:
                self._left = strategy.save(folder / OPTIMIZER_FILE, in_background=self.in_background)
            if world.is_main:
                if not (folder / "adapter_config.json").exists():
                    tokenizer.save_pretrained(folder)
                if not only_model:
                    save_torch(folder / SCHEDULE_FILE, schedule.state_dict())
                write_json(folder / STATE_FILE, state.to_json())
                write_json(folder / ARGS_FILE, args)
            self._open, self._path = stack.pop_all(), path
        if self._left is None:
            self.finish()
        return path

    def finish(self) -> None:
        """Wait until what is being written is there, and give it its name. Every process comes here."""
        if self._open is None or self._path is None:
            return
        opened, path, self._open, self._path = self._open, self._path, None, None
        with opened:
            if self._left is not None:
                self._left.result()
                self._left = None
            self.world.barrier()
        self.world.barrier()  # the folder has its name now
        if self.world.is_main:
            weights = {file.name: sha256_file(file) for file in sorted(path.glob("*.safetensors"))}
            audit.append(self.run / "audit.jsonl", "checkpoint", {"checkpoint": path.name, "sha256": weights})
            self.then(path)

    def finish_if_written(self, device: torch.device) -> None:
        """Give the checkpoint its name if every process has written its part."""
        if self._left is not None and not self.world.any(not self._left.done(), device):
            self.finish()


def _save_whole(model: Any, strategy: Strategy, tuner: Tuner, folder: Path, max_shard_size: str, *, writes: bool) -> None:
    """What ``tuner`` saves of a model whose tensors are in parts: gathered one by one, in the main process."""
    model = getattr(model, "saved_as", model)  # where another library's layers are trained, what names their tensors
    kept = tuner.kept(model)
    state = strategy.whole(model, only=None if kept is None else kept.__contains__)
    if writes:
        pipeline = getattr(strategy, "pipeline", None)
        with pipeline.stages.seen_whole() if pipeline is not None else contextlib.nullcontext(), _seen_whole(model, state):
            tuner.save(model, folder, max_shard_size=max_shard_size)


@contextlib.contextmanager
def _seen_whole(model: Any, state: dict[str, Any]) -> Iterator[None]:
    """Within, ``model.state_dict()`` is ``state``: what transformers and peft write is what they read there."""
    model.state_dict = lambda *_, **__: state
    try:
        yield
    finally:
        del model.state_dict  # the class's own is seen again


def check_resumable(path: Path) -> TrainState:
    """The state in ``path``; CheckpointError if training cannot go on from it."""
    if not states.exists(path / OPTIMIZER_FILE):
        raise CheckpointError(
            f"{path} holds no optimizer state: it was saved with --save_only_model", hint="--resume_only_model true takes its weights"
        )
    return read_state(path / STATE_FILE)


def load_optimizer(path: Path, *, strategy: Strategy, schedule: Any) -> None:
    """Put the state of ``path`` into optimizer and schedule; the model has its weights before it is spread."""
    strategy.load(path / OPTIMIZER_FILE)
    saved = torch.load(path / SCHEDULE_FILE, weights_only=True)
    # What it keeps for each group of parameters is taken from the groups here: another arrangement of processes has others.
    own = {name: value for name, value in schedule.state_dict().items() if isinstance(value, list)}
    for name, key in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        if name in own:
            own[name] = [group.get(key, value) for group, value in zip(schedule.optimizer.param_groups, own[name], strict=True)]
    schedule.load_state_dict({**saved, **own})


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
