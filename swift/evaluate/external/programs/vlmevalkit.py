"""What runs where VLMEvalKit is installed (PyPI: ms-vlmeval): its own arguments asked, and its own run."""

import ast
import contextlib
import json
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The names of its arguments, read from its source: importing it takes torch, torchvision and a minute."""
    found = find_spec("vlmeval")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("no vlmeval", name="vlmeval")
    source = Path(found.submodule_search_locations[0], "utils", "arguments.py").read_text(encoding="utf-8")
    (kind,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Arguments"]
    names = [node.target.id for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {"version": version("ms-vlmeval"), "options": sorted(names)}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate; VLMEvalKit writes its files below ``work_dir``. What it made of each data set stands in the answer."""
    arguments: Any = import_module("vlmeval.utils.arguments")
    library: Any = import_module("vlmeval.run")
    library.run_task(arguments.Arguments(**job["options"]))
    tables: dict[str, dict[str, str]] = {}
    folder = Path(job["options"]["work_dir"])
    for task in job["options"]["data"]:
        for file in sorted(folder.rglob(f"*_{task}_*acc.csv")) + sorted(folder.rglob(f"*_{task}_*score.json")):
            with contextlib.suppress(OSError):
                tables.setdefault(task, {})[file.name] = file.read_text(encoding="utf-8")
    return {"version": version("ms-vlmeval"), "tables": json.loads(json.dumps(tables))}
