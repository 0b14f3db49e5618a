"""What runs where lm-evaluation-harness is installed: its own names asked, and its own run. Nothing of swift is imported."""

import inspect
import json
import os
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The names that lm_eval knows; of the model's own options only if ``job["model_args"]`` has some (it imports torch)."""
    library: Any = import_module("lm_eval")
    manager: Any = import_module("lm_eval.tasks").TaskManager()
    problem = None
    try:
        for override in job["data"]:
            _leaves(manager, override)
    except ValueError as found:
        problem = str(found)
    return {
        "version": version("lm_eval"),
        "options": sorted(inspect.signature(inspect.unwrap(library.simple_evaluate)).parameters),
        "model_options": _model_options(job["model"]) if job["model_args"] else [],
        "tasks": sorted(manager.all_tasks),
        "problem": problem,
    }


# HFLM hands what it does not know on to transformers.
LOADING = {"attn_implementation", "device_map", "low_cpu_mem_usage", "load_in_4bit", "load_in_8bit", "quantization_config"}


def _model_options(name: str) -> list[str]:
    registry: Any = import_module("lm_eval.api.registry")
    names: set[str] = set(LOADING) if name == "hf" else set()
    for kind in registry.get_model(name).__mro__:
        if "__init__" in vars(kind):
            names |= set(inspect.signature(kind.__init__).parameters)
    return sorted(names - {"self", "args", "kwargs"})


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate; ``results.json`` and a ``samples_TASK.jsonl`` for each task are written below ``job["folder"]``."""
    library: Any = import_module("lm_eval")
    tasks: Any = import_module("lm_eval.tasks")
    plain: Any = import_module("lm_eval.utils").handle_non_serializable
    os.environ["OPENAI_API_KEY"] = job["key"] or "EMPTY"
    folder = Path(job["folder"])
    manager = tasks.TaskManager()
    if job["data"]:
        own = folder / "tasks"
        own.mkdir(parents=True, exist_ok=True)
        for override in job["data"]:
            _write_tasks(own, manager, override)
        manager = tasks.TaskManager(include_path=str(own))
    results: Any = library.simple_evaluate(**job["options"], task_manager=manager, log_samples=True)
    samples = results.pop("samples")
    tags = {name: sorted(manager.task_index[name].tags) for name in job["options"]["tasks"] if name in manager.all_tags}
    results["group_subtasks"] = results.get("group_subtasks", {}) | tags  # lm_eval keeps only the tasks of a tag
    for task, rows in samples.items():
        text = "".join(json.dumps(row, default=plain, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"samples_{task}.jsonl").write_text(text, encoding="utf-8")
    text = json.dumps(results, default=plain, ensure_ascii=False, indent=1)
    (folder / "results.json").write_text(text, encoding="utf-8")
    return {"version": version("lm_eval")}


def _leaves(manager: Any, override: dict[str, Any]) -> list[str]:
    """The tasks below ``override["task"]`` for whose subset there is data; ValueError if there are none."""
    name, subsets = override["task"], override["subsets"]
    if name in manager.all_subtasks:
        return [name]
    known = set(manager.all_subtasks)
    found = [leaf for subset in subsets if (leaf := f"{name}_{subset}") in known and _subset(manager, leaf) == subset]
    if not found:
        raise ValueError(f"{override['folder']} has none of the subsets of {name}; it has {', '.join(subsets[:8]) or 'none'}")
    return found


def _subset(manager: Any, leaf: str) -> str | None:
    """The name that the hub has for the data of ``leaf``. The file is not read as YAML: it may call functions."""
    path = manager.task_index[leaf].yaml_path
    said = re.search(r'^"?dataset_name"?:\s*"?([^"\n]+?)"?\s*$', Path(path).read_text(encoding="utf-8"), re.MULTILINE) if path else None
    return said[1] if said else None


def _write_tasks(own: Path, manager: Any, override: dict[str, Any]) -> None:
    """The tasks again, with their data in a folder, and for a group one of those that have data."""
    name, leaves = override["task"], _leaves(manager, override)
    for leaf in leaves:
        made = {"include": str(manager.task_index[leaf].yaml_path), "task": leaf, "dataset_path": override["folder"]}
        (own / f"{leaf}.yaml").write_text(json.dumps(made), encoding="utf-8")
    if leaves != [name]:
        metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
        group = {"group": name, "task": leaves, "aggregate_metric_list": metrics}
        (own / f"{name}.yaml").write_text(json.dumps(group), encoding="utf-8")
