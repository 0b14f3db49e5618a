"""How far a run is, on disk: hidden states of the text in front of the next block, tensors of the blocks that are done."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from swift import __version__, console
from swift.config.export import ExportConfig
from swift.config.options import to_dict
from swift.files import new_file, write_json
from swift.model.artifact import ModelFolder
from swift.quantize.base import Plan
from swift.quantize.calibrate import Documents
from swift.quantize.folds import Fold, Known
from swift.quantize.passes import Batch
from swift.quantize.skeleton import Call, Skeleton
from swift.quantize.store import Store
from swift.quantize.tensors import PART

STATE_FILE = "state.json"
WITHOUT_EFFECT = {"output_dir", "exist_ok", "max_kl", "max_shard_size", "device"}
OF_UPLOAD = {"push_to_hub", "hub_model_id", "hub_private_repo", "commit_message"}


class Progress:
    """The state in ``folder``: of the same work if an earlier run left it, else a new one. ``block`` is the next to be done."""

    def __init__(self, folder: Path, model: ModelFolder, config: ExportConfig, plan: Plan, texts: Documents, device: torch.device) -> None:
        self.folder = folder
        self.key = _key(model, config, plan, texts)
        self.block = 0
        self.errors: dict[str, float] = {}
        self.folds: Known = {}
        state = _read(folder / STATE_FILE)
        goes_on = state.get("key") == self.key
        for entry in folder.parent.iterdir() if folder.parent.is_dir() else ():
            if not (goes_on and entry == folder):  # files that were put together are put together anew, maybe to other sizes
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        if goes_on:
            self.block, self.errors = state["block"], state["errors"]
            self.folds = {tuple(layers): None if fold is None else Fold.of(fold, device) for layers, fold in state["folds"]}
            console.say(f"going on at block {self.block + 1}: an earlier run was ended there")

    @property
    def resumes(self) -> bool:
        return self.block > 0

    def save(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write the new tensors of block ``index``."""
        with new_file(self._file(index)) as temporary:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)

    def done(self, index: int, errors: dict[str, float]) -> None:
        """Block ``index`` and what it gives are on disk."""
        self.errors |= errors
        self.block = index + 1
        folds = [(layers, None if fold is None else fold.as_dict()) for layers, fold in self.folds.items()]
        write_json(self.folder / STATE_FILE, {"key": self.key, "block": self.block, "errors": self.errors, "folds": folds})

    def block_files(self, count: int) -> list[Path]:
        return [self._file(index) for index in range(count)]

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


class Stream:
    """Hidden states of ``batches`` on their way through the blocks: in front of a block, and behind it."""

    def __init__(self, progress: Progress, name: str, batches: list[Batch], skeleton: Skeleton) -> None:
        self.batches = batches
        self.skeleton = skeleton
        width = skeleton.width
        shapes: list[tuple[int, ...]] = [(*batch.shape, width) for batch in batches]
        sizes = [batch.ids.numel() * width for batch in batches]
        self._stores = [Store(progress.folder / f"{name}-{side}", sizes) for side in (0, 1)]
        self._side = progress.block % 2
        self._calls: dict[tuple[int, int], list[Call]] = {shape: skeleton.calls(shape) for shape in {batch.shape for batch in batches}}
        if progress.resumes:
            self.hidden.found(shapes)
            return
        for index, batch in enumerate(batches):
            self.hidden.write(index, skeleton.embed(batch.ids))

    @property
    def hidden(self) -> Store:
        """In front of the block at hand."""
        return self._stores[self._side]

    @property
    def next(self) -> Store:
        """Behind it."""
        return self._stores[1 - self._side]

    def step(self) -> None:
        """What was behind the block is in front of the next one."""
        self._side = 1 - self._side

    def indices(self) -> Iterator[int]:
        """Batches, one after the other."""
        yield from range(len(self.batches))

    def read(self, index: int) -> Tensor:
        return self.hidden.read(index).to(self.skeleton.device)

    def write(self, index: int, states: Tensor) -> None:
        self.next.write(index, states)

    def call(self, index: int, block: int) -> Call:
        return self._calls[self.batches[index].shape][block]

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def calls_of(self, block: int) -> dict[tuple[int, int], Call]:
        return {shape: calls[block] for shape, calls in self._calls.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _key(model: ModelFolder, config: ExportConfig, plan: Plan, texts: Documents) -> str:
    """A digest of everything that the result depends on. Of weights: sizes, and the beginning and end of each file."""
    options = {name: value for name, value in to_dict(config).items() if name not in WITHOUT_EFFECT | OF_UPLOAD}
    parts = [__version__, options, model.config, str(plan), texts.calibration, texts.held_out]
    sha = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for file in model.weight_files:
        size = file.stat().st_size
        sha.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            sha.update(stream.read(PART))
            stream.seek(max(0, size - PART))
            sha.update(stream.read(PART))
    return sha.hexdigest()
