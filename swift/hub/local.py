"""A folder on this machine: used where it lies, never copied. GGUF files are converted into the cache."""

import json
from pathlib import Path
from typing import Any

from swift.errors import HubError, ModelError, near
from swift.files import machine_error, visible_files
from swift.hub import cache
from swift.hub.safetensors_header import read_header
from swift.hub.snapshot import Hub, Snapshot

_FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")


def resolve(
    name: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    offline: bool = False,
    repo_type: str = "model",
    refresh: bool = False,
) -> Snapshot:
    """The snapshot of the folder or .gguf file ``name``; its revision is "local", its sha256 are not computed.

    A model's folder needs a config.json and whole safetensors files. Raises HubError if there is no such path,
    ModelError if it holds no usable model, MachineError if it cannot be read.
    """
    path = Path(name).expanduser()
    try:
        if not path.exists():
            raise HubError(f"{name} does not exist", hint=_suggestion(path))
        path = path.resolve()
        files = _list(path) if path.is_dir() else {path.name: path.stat().st_size}
    except OSError as problem:
        raise machine_error(problem, path) from problem
    if repo_type != "model":
        return Snapshot(path, str(path), "local", files)
    if path.is_file() or ("config.json" not in files and any(file.endswith(".gguf") for file in files)):
        return _from_gguf(path, files, refresh=refresh)
    check_model(path, files)
    return Snapshot(path, str(path), "local", files)


def check_model(path: Path, files: dict[str, int]) -> None:
    """ModelError unless ``path`` holds a config.json that parses and whole safetensors files, all that its index names."""
    if "config.json" not in files:
        hint = "name the adapter with --adapters and its base with --model" if "adapter_config.json" in files else None
        raise ModelError(f"{path} holds no config.json", hint=hint or "name the folder of a model in the format of transformers")
    _read_json(path / "config.json")
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if not weights:
        foreign = next((file for file in files if file.endswith(_FOREIGN_WEIGHTS)), None)
        if foreign:
            raise ModelError(f"{path} holds weights as {foreign}; only safetensors are read", hint="convert them to safetensors first")
        raise ModelError(f"{path} holds no *.safetensors file")
    if "model.safetensors.index.json" in files:
        index = _read_json(path / "model.safetensors.index.json").get("weight_map")
        missing = sorted(set(index.values()) - set(files)) if isinstance(index, dict) else ["weight_map"]
        if missing:
            raise ModelError(f"{path / 'model.safetensors.index.json'} names {missing[0]}, which is not there")
    for file in weights:
        read_header(path / file)


def _from_gguf(path: Path, files: dict[str, int], *, refresh: bool) -> Snapshot:
    from swift.hub import gguf

    found = sorted(file for file in files if file.endswith(".gguf"))
    if len(found) != 1:
        if not found:
            raise ModelError(f"{path} is no model", hint="name the folder of a model, or a .gguf file")
        raise ModelError(f"{path} holds {len(found)} GGUF files", hint=f"name one of them, such as {path / found[0]}")
    source = path if path.is_file() else path / found[0]
    revision = gguf.file_revision(source)
    name = source.stem
    if not refresh and (snapshot := cache.find("model", "gguf", name, revision)):
        return snapshot
    with cache.locked("model", "gguf", name):
        if not refresh and (snapshot := cache.find("model", "gguf", name, revision)):
            return snapshot

        def fill(folder: Path) -> dict[str, Any]:
            return gguf.convert(source, folder) | {"reference": str(source)}

        return cache.add("model", "gguf", name, revision, fill)


def _list(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in visible_files(folder)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise machine_error(problem, path) from problem
    except ValueError as problem:
        raise ModelError(f"{path} is not JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _suggestion(path: Path) -> str:
    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    match = near(path.name, siblings)
    return f"did you mean {path.parent / match}?" if match else "name a folder, pkg::NAME, hf::ORG/NAME or ms::ORG/NAME"


HUB = Hub("this machine", resolve)
