"""EvalScope, which asks a server: its own data sets, prompts, extraction of answers and metrics.

It lives in an environment of its own, since it needs an older huggingface_hub than swift does.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from swift.config.evaluate import EvalConfig
from swift.errors import ConfigError, MachineError
from swift.evaluate.base import ModelResult, Outcome, TaskResult
from swift.evaluate.external.base import (
    GENERATION,
    check_settings,
    extra,
    generation,
    own_folder,
    refuse_ours,
    refuse_unknown,
    settings,
    task_result,
)
from swift.evaluate.external.layout import laid_out
from swift.evaluate.external.process import require, work
from swift.evaluate.external.server import Served, serving
from swift.evaluate.subject import Subject
from swift.model.template import read_system

NAMES = GENERATION | {"stop_words": "stop_seqs"}
# What we say ourselves, and the option that says it.
OURS = {
    "model": "the models",
    "model_id": "the models",
    "api_url": "--eval_url",
    "api_key": "--eval_api_key",
    "datasets": "--eval_dataset",
    "dataset_args": "--eval_dataset_args",
    "limit": "--eval_limit",
    "eval_batch_size": "--eval_num_proc",
    "generation_config": "--eval_generation_config",
    "work_dir": "--eval_output_dir",
    "no_timestamp": "--eval_output_dir",
    "use_cache": "--eval_output_dir",
    "rerun_review": "--eval_output_dir",
    "seed": "--seed",
    "eval_backend": "--eval_backend",
}


def check(config: EvalConfig) -> None:
    """See Evaluator. EvalScope's own schema judges the options, and its registry the names of tasks."""
    require("evalscope", config)
    if config.eval_mode not in (None, "generate"):
        raise ConfigError(f"--eval_mode {config.eval_mode} is not EvalScope's: it asks a server for written answers", hint="remove it")
    if config.use_chat_template is False:
        raise ConfigError("--use_chat_template false is not EvalScope's: it asks a server in messages", hint="remove it")
    check_settings(config)
    refuse_ours(config, OURS)
    options = options_of(config) | {"model": "model", "api_url": "http://127.0.0.1/v1", "api_key": "none"}
    judge(config, work("evalscope", "check", {"config": options}, config))


def judge(config: EvalConfig, known: Mapping[str, Any]) -> None:
    """ConfigError for a name that is not among those that EvalScope has said it knows, or for what its schema refuses."""
    what = f"which EvalScope {known['version']} does not know"
    refuse_unknown(extra(config), known["options"], "--extra_eval_args", what)
    refuse_unknown(config.eval_dataset, known["tasks"], "--eval_dataset", what)
    refuse_unknown(generation(config, NAMES), known["generation"], "--eval_generation_config", what)
    for task in config.eval_dataset:
        refuse_unknown(settings(config, task), ["local_path", *known["settings"]], f"--eval_dataset_args of {task}", what)
    if known["problem"]:
        raise ConfigError(f"EvalScope {known['version']} refuses {known['problem'].splitlines()[0]}")


def options_of(config: EvalConfig) -> dict[str, Any]:
    """EvalScope's TaskConfig, but for the model and where it is served."""
    arguments = {task: laid_out(config, "evalscope", task) for task in config.eval_dataset}
    if (system := read_system(config.system)) is not None:
        arguments = {task: {"system_prompt": system} | given for task, given in arguments.items()}
    options: dict[str, Any] = {
        "datasets": list(config.eval_dataset),
        "dataset_args": {task: given for task, given in arguments.items() if given},
        "eval_type": "openai_api",
        "eval_batch_size": config.eval_num_proc,
        "generation_config": {"temperature": 0.0} | generation(config, NAMES),
        "limit": config.eval_limit,
        "seed": config.seed,
    }
    if config.enable_thinking is not None:
        options["generation_config"].setdefault("extra_body", {"chat_template_kwargs": {"enable_thinking": config.enable_thinking}})
    if config.use_hf is not None:
        options["dataset_hub"] = "huggingface" if config.use_hf else "modelscope"
    return options | extra(config)


def run(config: EvalConfig, models: Sequence[Subject], folder: Path) -> list[ModelResult]:
    """See Evaluator. Equal options go on in the folder of a run that was stopped: what was answered is not asked again."""
    check(config)
    options, results = options_of(config), []
    for model in models:
        own = own_folder(folder, model, "evalscope", options)
        with serving(model, own / "server.log") as served:
            found = work("evalscope", "run", {"config": options | place(own, served)}, config, log=own / "log.txt", server=served.child)
        maker = f"evalscope {found['version']}"
        tasks = [read_task(own, served.model, task, maker, options) for task in config.eval_dataset]
        facts = {"evaluator": maker, "files": str(own), "asked": config.eval_url or "swift deploy"}
        results.append(ModelResult(model.name, tasks, facts))
    return results


def place(own: Path, served: Served) -> dict[str, Any]:
    """Whom EvalScope asks, and where it writes."""
    made: dict[str, Any] = {"model": served.model, "model_id": served.model, "api_url": served.url, "api_key": served.key or "EMPTY"}
    made |= {"work_dir": str(own), "no_timestamp": True}
    if (own / "configs" / "task_config.yaml").is_file():
        # Its identity of a run holds the address of the server, whose port is a new one each time: what was answered is
        # used, and judged again. The folder's name says that model and options are the same.
        made |= {"use_cache": str(own), "rerun_review": True}
    return made


def read_task(own: Path, model: str, task: str, maker: str, options: dict[str, Any]) -> TaskResult:
    """A task as EvalScope has written it below ``own``; MachineError if it has not."""
    try:
        report = json.loads((own / "reports" / model / f"{task}.json").read_text(encoding="utf-8"))
        rows = _rows(own, model, task, options["datasets"])
        outcomes = [_outcome(row, subset) for subset, row in rows]
        numbers = _numbers(report)
        metric = _main_metric(rows) or next(iter(numbers), "")
        resolved = _resolved(own, task)
        counts = _counts(report, rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise MachineError(f"{own} does not hold what {maker} writes of {task}: {problem or type(problem).__name__}") from None
    about = {
        "num_fewshot": resolved.get("few_shot_num"),
        "uses_chat_template": True,
        "source": resolved.get("dataset_id"),
        "counts": counts,
    }
    title = report.get("dataset_pretty_name") or task
    return task_result(task, title, maker, options, metric=metric, outcomes=outcomes, numbers=numbers, about=about)


def _numbers(report: dict[str, Any]) -> dict[str, float]:
    """Its own numbers: NAME:AGGREGATION[DIMENSIONS] over all items, and the mean of subsets where that differs."""
    numbers = {}
    for metric in report["metrics"]:
        identity = metric["identity"]
        dimensions = ",".join(f"{key}={json.dumps(value)}" for key, value in identity.get("dimensions", {}).items())
        name = f"{identity['name']}:{identity['aggregation']}" + (f"[{dimensions}]" if dimensions else "")
        numbers[name] = float(metric["score"])
        if metric["macro_score"] != metric["score"]:
            numbers[f"{name} macro"] = float(metric["macro_score"])
    return numbers


def _rows(own: Path, model: str, task: str, tasks: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(subset, line) of its reviews, in the order of the data; it writes them in the order of the answers."""
    found = []
    longer = tuple(f"{name}_" for name in tasks if name.startswith(f"{task}_"))  # mmlu_pro_math.jsonl is none of mmlu
    for file in sorted((own / "reviews" / model).glob(f"{task}_*.jsonl")):
        if file.stem.startswith(longer):
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found += [(file.stem.removeprefix(f"{task}_"), row) for row in sorted(rows, key=lambda row: int(row["index"]))]
    return found


def _main_metric(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The metric of an item that EvalScope takes first."""
    for _, row in rows:
        score = row["sample_score"]["score"]
        return str(score.get("main_score_name") or next(iter(score["value"]), ""))
    return ""


def _failed(row: Mapping[str, Any]) -> dict[str, str]:
    """Metrics that EvalScope could not compute of an item, and why; it counts them as 0."""
    return (row["sample_score"]["score"].get("metadata") or {}).get("metric_errors") or {}


def _counts(report: dict[str, Any], rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """What a reader must know of items: those without an answer, and those whose 0 is none."""
    found = Counter(f"EvalScope could not compute {name}, and its own mean counts a 0" for _, row in rows for name in _failed(row))
    errored = int((report.get("execution_summary") or {}).get("errored") or 0)
    return dict(found) | ({"EvalScope got no answer": errored} if errored else {})


def _resolved(own: Path, task: str) -> dict[str, Any]:
    """What EvalScope made of the options of a task."""
    made: dict[str, Any] = yaml.safe_load((own / "configs" / "task_config.yaml").read_text(encoding="utf-8"))
    return dict(made["resolved_benchmarks"][task])


def _outcome(row: dict[str, Any], subset: str) -> Outcome:
    """A line of its reviews: what was asked and said, and the values of the metrics that could be computed."""
    score, failed, gold = row["sample_score"]["score"], _failed(row), row["target"]
    broken = tuple(name.lower() for name in failed)
    return Outcome(
        id=f"{subset}:{row['index']}",
        category=subset,
        prompt="\n\n".join(_text(message) for message in row["messages"] if message["role"] != "assistant"),
        gold=" | ".join(map(str, gold)) if isinstance(gold, list) else str(gold),
        prediction=score.get("extracted_prediction") or None,
        metrics={name: float(value) for name, value in score["value"].items() if not name.lower().startswith(broken)},
        detail={"answer": score.get("prediction")} | ({"failed": failed} if failed else {}),
    )


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
