"""What runs where EvalScope is installed: its own schema asked, and its own run. Nothing of swift is imported."""

import dataclasses
from importlib import import_module
from importlib.metadata import version
from typing import Any


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The names that EvalScope knows, and what its own schema says against ``job["config"]`` (None if nothing)."""
    import_module("evalscope.benchmarks")  # fills the registry
    benchmark: Any = import_module("evalscope.api.benchmark")
    model: Any = import_module("evalscope.api.model")
    registry: Any = import_module("evalscope.api.registry")
    library: Any = import_module("evalscope.config")
    refusal: Any = import_module("pydantic").ValidationError
    problem = None
    try:
        library.TaskConfig.from_dict(job["config"])
    except refusal as found:
        first = found.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, TypeError, ImportError) as found:
        problem = str(found)
    return {
        "version": version("evalscope"),
        "options": sorted(library.TaskConfig.model_fields),
        "generation": sorted(model.GenerateConfig.model_fields),
        "settings": sorted(field.name for field in dataclasses.fields(benchmark.BenchmarkMeta)),
        "tasks": sorted(registry.BENCHMARK_REGISTRY),
        "problem": problem,
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate; EvalScope writes its files below ``work_dir``."""
    library: Any = import_module("evalscope")
    library.run_task(library.TaskConfig.from_dict(job["config"]))
    return {"version": version("evalscope")}
