"""What runs where VLMEvalKit is installed (PyPI: ms-vlmeval): its own arguments asked, and its own run."""

import ast
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The names of its arguments, read from its source: importing it takes torch and torchvision."""
    found = find_spec("vlmeval")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("no vlmeval", name="vlmeval")
    source = Path(found.submodule_search_locations[0], "utils", "arguments.py").read_text(encoding="utf-8")
    (kind,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Arguments"]
    names = [node.target.id for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {"version": version("ms-vlmeval"), "options": sorted(names)}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate; VLMEvalKit writes its files below ``work_dir``. The answer holds its summary, a row a data set."""
    arguments: Any = import_module("vlmeval.utils.arguments")
    library: Any = import_module("vlmeval.run")
    report: Any = import_module("vlmeval.smp").collect_run_benchmark_report
    library.run_task(arguments.Arguments(**job["options"]))
    folder = Path(job["options"]["work_dir"])
    files = sorted(folder.rglob("status.json"), reverse=True)  # folders are named by time; one that was stopped is still there
    rows = [row for file in files for row in report(str(file.parent))]
    return {"version": version("ms-vlmeval"), "rows": rows}
