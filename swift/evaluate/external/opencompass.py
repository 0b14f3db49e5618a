"""OpenCompass, which asks a server; it lives in an environment of its own, since it needs numpy 1 and old releases of others."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swift.config.evaluate import EvalConfig
from swift.errors import ConfigError, MachineError
from swift.evaluate.base import ModelResult, TaskResult
from swift.evaluate.external.base import check_settings, extra, generation, own_folder, refuse_ours, refuse_unknown, settings, task_result
from swift.evaluate.external.process import require, work
from swift.evaluate.external.server import Served, serving
from swift.evaluate.subject import Subject

NAMES = {"max_new_tokens": "max_out_len", "temperature": "temperature"}
OURS = {
    "models": "the models",
    "hf-path": "the models",
    "datasets": "--eval_dataset",
    "work-dir": "--eval_output_dir",
    "reuse": "--eval_output_dir",
    "config-dir": "--eval_dataset",
}
MODEL = (  # fields of its class OpenAISDK, and those of every model of OpenCompass
    "max_seq_len query_per_second rpm_verbose retry meta_template openai_proxy_url mode temperature tokenizer_path extra_body verbose"
    " http_client_cfg status_code_mappings think_tag max_workers openai_extra_kwargs timeout max_out_len batch_size run_cfg"
    " pred_postprocessor"
).split()


def check(config: EvalConfig) -> None:
    """See Evaluator. Its own parser judges the options; data sets are files of its configs, such as mmlu_gen."""
    require("opencompass", config)
    because = "with OpenCompass, whose data sets say how they are asked"
    config.refuse_without_effect(("eval_mode", "eval_num_fewshot", "system", "use_chat_template"), because)
    check_settings(config)
    refuse_ours(config, OURS)
    judge(config, work("opencompass", "check", {"words": words_of(config)}, config))


def judge(config: EvalConfig, known: Mapping[str, Any]) -> None:
    """ConfigError for a name that is not among those that OpenCompass has said it knows, or for what its parser refuses."""
    given = {name.replace("_", "-"): value for name, value in extra(config).items()}
    what = f"which OpenCompass {known['version']} does not know"
    refuse_unknown(given, known["options"], "--extra_eval_args", what)
    refuse_unknown(config.eval_dataset, known["tasks"], "--eval_dataset", what)
    refuse_unknown(generation(config, NAMES), MODEL, "--eval_generation_config", what)
    for task in config.eval_dataset:
        refuse_unknown(settings(config, task), ["local_path"], f"--eval_dataset_args of {task}", "which has no meaning for OpenCompass")
    if known["problem"]:
        raise ConfigError(f"OpenCompass {known['version']} refuses {known['problem'].splitlines()[0]}")


def words_of(config: EvalConfig) -> list[str]:
    """--extra_eval_args as words of its command line: true is a flag, a list several words."""
    words = []
    for name, value in extra(config).items():
        if value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [str(one) for one in (value if isinstance(value, list) else [value])]
    return words


def model_of(config: EvalConfig, served: Served, tokenizer: str | None) -> dict[str, Any]:
    """The model in its config file. The key stands in the environment, and in no file."""
    made: dict[str, Any] = {
        "abbr": served.model,
        "type": "opencompass.models.OpenAISDK",
        "path": served.model,
        "key": "ENV",
        "openai_api_base": served.url,
        "meta_template": {"round": [{"role": "HUMAN", "api_role": "HUMAN"}, {"role": "BOT", "api_role": "BOT", "generate": True}]},
        "query_per_second": config.eval_num_proc,
        "batch_size": config.eval_num_proc,
        "max_out_len": 2048,
        "max_seq_len": config.max_model_len or 16384,
        "temperature": 0.0,
        "retry": 2,
    }
    if tokenizer is not None:
        made["tokenizer_path"] = tokenizer  # it would fetch tiktoken's files otherwise
    return made | generation(config, NAMES)


def run(config: EvalConfig, models: Sequence[Subject], folder: Path) -> list[ModelResult]:
    """See Evaluator. A run that was stopped begins anew."""
    check(config)
    tasks = [{"name": task, "path": settings(config, task).get("local_path")} for task in config.eval_dataset]
    asked = {"tasks": tasks, "limit": config.eval_limit, "words": words_of(config)}
    options, results = asked | {"generation": generation(config, NAMES)}, []
    for model in models:
        own = own_folder(folder, model, "opencompass", options)
        with serving(model, own / "server.log") as served:
            tokenizer = None if config.eval_url is not None and config.model is None else str(model.source.path)
            job = asked | {"folder": str(own), "key": served.key, "model": model_of(config, served, tokenizer)}
            found = work("opencompass", "run", job, config, log=own / "log.txt", server=served.child)
        maker = f"OpenCompass {found['version']}"
        rows, names = found["rows"], found["names"]
        made = [read_rows(rows, task, names[task], served.model, maker, own, options) for task in config.eval_dataset]
        results.append(ModelResult(model.name, made, {"evaluator": maker, "files": str(own), "asked": config.eval_url or "swift deploy"}))
    return results


def read_rows(
    rows: Sequence[Mapping[str, str]], task: str, parts: Sequence[str], model: str, maker: str, own: Path, options: Mapping[str, Any]
) -> TaskResult:
    """The rows of its summary that belong to ``task``: its numbers, in percent as it gives them; it gives no items here."""
    numbers: dict[str, float] = {}
    for row in rows:
        if row.get("dataset") not in parts:
            continue
        name = row["metric"] if len(parts) == 1 else f"{row['dataset']} {row['metric']}"
        value = _number(row.get(model, ""))
        if not math.isnan(value):
            numbers[name] = value
    if not numbers:
        raise MachineError(f"{maker} gives no number for {task}", hint=f"see {own / 'log.txt'}")
    about = {"uses_chat_template": True}
    return task_result(task, task, maker, options, metric=next(iter(numbers)), outcomes=[], numbers=numbers, about=about)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
