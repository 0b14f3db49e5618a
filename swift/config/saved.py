"""Options that a run has saved, for the commands that go on from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift.config import compat
from swift.errors import CheckpointError

ARGS_FILE = "args.json"
# What a run says of the model and of how rows are rendered, which a later command needs too.
INFERENCE_OPTIONS = (
    "model model_revision use_hf torch_dtype attn_impl chat_template system quant_method quant_bits bnb_4bit_compute_dtype "
    "bnb_4bit_quant_type bnb_4bit_use_double_quant enable_thinking use_chat_template"
).split()
DATA_OPTIONS = "dataset val_dataset split_dataset_ratio data_seed dataset_shuffle columns model_name model_author".split()


def saved_options(said: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """(source, options) saved by the run that ``said`` goes on from; None if it goes on from none."""
    resume = _one(said.get("resume_from_checkpoint"))
    if resume is not None:
        if resume.lower() == "false":
            return None
        run = (_one(said.get("output_dir")) or "output") if resume.lower() == "true" else resume
        path = find_args(Path(run))
        if path is None:
            hint = "name a run directory (it has an args.json) or a checkpoint-N in it"
            raise CheckpointError(f"{run} holds no run to go on with", hint=hint)
        return f"checkpoint {path.parent}", read_args(path)
    adapters = said.get("adapters")
    place = _one(adapters) or _one(said.get("model"))
    if place is None or _one(said.get("load_args", "true")).lower() == "false":  # type: ignore[union-attr]
        return None
    path = find_args(Path(place))
    if path is None:
        return None
    saved = read_args(path)
    names = list(INFERENCE_OPTIONS)
    if str(_one(said.get("load_data_args"))).lower() == "true":
        names += DATA_OPTIONS
    options = {name: saved[name] for name in names if saved.get(name) is not None}
    if not adapters:
        options.pop("model", None)
    return f"checkpoint {path.parent}", options


def find_args(place: Path) -> Path | None:
    """The args.json of a checkpoint, of the run it belongs to, or of the newest run below a folder."""
    if not place.is_dir():
        return None
    for folder in (place, place.resolve().parent):
        if (folder / ARGS_FILE).is_file():
            return folder / ARGS_FILE
    versions = sorted(place.glob(f"v*-*/{ARGS_FILE}"), key=lambda path: (path.stat().st_mtime, path.parent.name))
    return versions[-1] if versions else None


def read_args(path: Path) -> dict[str, Any]:
    """The options in an args.json, ours or ms-swift's, by today's names."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be read: {problem}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    options: dict[str, Any] = {}
    for name, value in raw.items():
        new, value, _ = compat.modern(name, value)
        if value is not None:
            options.setdefault(new, value)
    return options


def _one(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else str(value)
