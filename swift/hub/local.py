"""Models and data sets that lie on disk: used where they are, never copied."""

import json
import os
from pathlib import Path

from swift import audit
from swift.errors import HubError, MachineError, ModelError
from swift.hub import cache
from swift.hub.gguf import convert
from swift.hub.reference import Reference
from swift.hub.safetensors_header import read_headers
from swift.hub.snapshot import Snapshot, files_in


def resolve(name: str, revision: str | None, *, repo_type: str = "model", token: str | None = None, offline: bool = False) -> Snapshot:
    """The folder ``name`` itself; a GGUF file is converted once, into the cache.

    Raises ModelError for a folder without a readable config.json or with damaged weights.
    """
    path = Path(name)
    if not path.exists():
        raise HubError(f"there is no path {name}", hint="check the spelling, or write hf::ORG/NAME, ms::ORG/NAME, pkg::NAME")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise MachineError(f"{path} may not be read", hint="change its permissions, or run as another user")
    if revision is not None:
        raise HubError(f"{name} is a path, which has no revisions", hint="leave the revision away")
    if repo_type == "dataset":
        return Snapshot(path, str(path), "local", files_in(path) if path.is_dir() else {path.name: path.stat().st_size})
    gguf = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if path.is_file() and not gguf:
        raise ModelError(f"{path} is a file, not a model folder", hint="name the folder that holds config.json and *.safetensors")
    if gguf and not (path / "config.json").is_file():
        if len(gguf) > 1:
            raise ModelError(f"{path} holds {len(gguf)} GGUF files", hint=f"name one of them: {gguf[0]}")
        return _from_gguf(gguf[0])
    _check(path)
    return Snapshot(path, str(path), "local", files_in(path))


def _check(path: Path) -> None:
    config = path / "config.json"
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        hint = "it holds an adapter: say --adapters for it" if (path / "adapter_config.json").is_file() else "name a folder that save_pretrained wrote"
        raise ModelError(f"{path} holds no config.json, so it is no model", hint=hint) from None
    except (ValueError, OSError) as problem:
        raise ModelError(f"{config} cannot be read: {problem}") from None
    if not read_headers(path):
        others = [file.name for file in path.glob("*.bin")] + [file.name for file in path.glob("*.pth")]
        more = f"; {others[0]} can run code when it is loaded and is not read" if others else ""
        raise ModelError(f"{path} holds no *.safetensors{more}", hint="save the model with safe_serialization=True")


def _from_gguf(file: Path) -> Snapshot:
    digest = audit.sha256_file(file)
    reference = Reference("local", str(file), digest[:16])
    with cache.locked(reference):
        if (found := cache.find(reference)) is None:
            with cache.new_snapshot(reference, digest[:16]) as folder:
                convert(file, folder)
            found = cache.find(reference)
    assert found is not None
    return found
