"""VLMEvalKit: models that read images, asked on a server; its own data sets, prompts and metrics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swift.config.evaluate import EvalConfig
from swift.errors import MachineError
from swift.evaluate.base import ModelResult, TaskResult
from swift.evaluate.external.base import GENERATION, extra, generation, own_folder, refuse_ours, refuse_unknown, task_result
from swift.evaluate.external.process import require, work
from swift.evaluate.external.server import Served, serving
from swift.evaluate.subject import Subject

# Of generation it takes these alone.
NAMES = {name: theirs for name, theirs in GENERATION.items() if theirs != "stop"}
OURS = {
    "data": "--eval_dataset",
    "model": "the models",
    "base_url": "--eval_url",
    "key": "--eval_api_key",
    "work_dir": "--eval_output_dir",
    "reuse": "--eval_output_dir",
    "api_nproc": "--eval_num_proc",
    "nproc": "--eval_num_proc",
    "limit": "--eval_limit",
}
NO_JUDGE = "exact_matching"  # left open, VLMEvalKit sends questions and answers to a model of OpenAI


def check(config: EvalConfig) -> None:
    """See Evaluator. Names of data sets are not checked: it takes any name of which it finds a table."""
    require("vlmeval", config)
    because = "with VLMEvalKit, whose data sets say how they are asked"
    config.refuse_without_effect(
        ("eval_mode", "eval_num_fewshot", "eval_dataset_args", "eval_data_dir", "system", "use_chat_template"), because
    )
    refuse_ours(config, OURS)
    judge(config, work("vlmevalkit", "check", {}, config))


def judge(config: EvalConfig, known: Mapping[str, Any]) -> None:
    """ConfigError for a name that is not among those that VLMEvalKit has said it knows."""
    what = f"which VLMEvalKit {known['version']} does not know"
    refuse_unknown(extra(config), known["options"], "--extra_eval_args", what)
    refuse_unknown(generation(config, NAMES), known["options"], "--eval_generation_config", what)


def options_of(config: EvalConfig) -> dict[str, Any]:
    """Arguments of VLMEvalKit, but for the model and where it is served."""
    options: dict[str, Any] = {"data": list(config.eval_dataset), "api_nproc": config.eval_num_proc, "judge": NO_JUDGE, "reuse": True}
    options |= {"temperature": 0.0, "max_tokens": 2048} | generation(config, NAMES)
    if config.eval_limit is not None:
        options["limit"] = config.eval_limit
    if config.enable_thinking is not None:
        options["extra_body"] = json.dumps({"chat_template_kwargs": {"enable_thinking": config.enable_thinking}})
    return options | extra(config)


def place(own: Path, served: Served) -> dict[str, Any]:
    """Whom it asks, and where it writes."""
    return {"model": [served.model], "base_url": served.url, "key": served.key or "EMPTY", "work_dir": str(own)}


def run(config: EvalConfig, models: Sequence[Subject], folder: Path) -> list[ModelResult]:
    """See Evaluator. A run that was stopped goes on."""
    check(config)
    options, results = options_of(config), []
    for model in models:
        own = own_folder(folder, model, "vlmevalkit", options)
        with serving(model, own / "server.log") as served:
            found = work("vlmevalkit", "run", {"options": options | place(own, served)}, config, log=own / "log.txt", server=served.child)
        maker = f"VLMEvalKit {found['version']}"
        tasks = [read_row(found["rows"], task, maker, own, options) for task in config.eval_dataset]
        results.append(ModelResult(model.name, tasks, {"evaluator": maker, "files": str(own), "asked": config.eval_url or "swift deploy"}))
    return results


def read_row(rows: Sequence[Mapping[str, Any]], task: str, maker: str, own: Path, options: Mapping[str, Any]) -> TaskResult:
    """The row of its summary for ``task``: its numbers, and how many items it could not ask; it gives no items."""
    row = next((row for row in rows if row.get("benchmark") == task), None)
    if row is None or row.get("eval_error"):
        said = str((row or {}).get("eval_error") or "it wrote nothing").splitlines()[0]
        raise MachineError(f"{maker} gives no numbers of {task}: {said}", hint=f"see {own / 'log.txt'}")
    names, values = row.get("primary_metric"), row.get("primary_metric_value")
    found = values if isinstance(values, dict) else {str(names): values}
    numbers = {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}
    if not numbers:
        raise MachineError(f"{maker} gives no number for {task}, but {values!r}", hint=f"see {own / 'log.txt'}")
    counts = {name: float(row[name]) for name in ("infer_failed", "infer_total", "judge_failed") if row.get(name) is not None}
    about = {"uses_chat_template": True}
    return task_result(task, task, maker, options, metric=next(iter(numbers)), outcomes=[], numbers=numbers | counts, about=about)
