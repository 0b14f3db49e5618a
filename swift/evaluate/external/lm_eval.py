"""lm-evaluation-harness: its own tasks and metrics, with transformers on the model itself, or asking a server."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from swift.evaluate.external.layout import laid_out, subsets_of
from swift.evaluate.external.process import Child, require, work
from swift.evaluate.external.server import serving
from swift.evaluate.subject import Subject
from swift.model.template import read_system

HF, COMPLETIONS, CHAT = "hf", "local-completions", "local-chat-completions"
# Our names of tasks, where it has others.
TASKS = {
    "ceval": ["ceval-valid"],
    "arc": ["arc_easy", "arc_challenge"],
    "truthfulqa": ["truthfulqa_mc1", "truthfulqa_mc2"],
}
NAMES = GENERATION | {"max_new_tokens": "max_gen_toks", "stop_words": "until"}
OURS = {
    "tasks": "--eval_dataset",
    "limit": "--eval_limit",
    "num_fewshot": "--eval_num_fewshot",
    "system_instruction": "--system",
    "apply_chat_template": "--use_chat_template",
    "gen_kwargs": "--eval_generation_config",
    "task_manager": "--eval_dataset_args",
    "evaluation_tracker": "--eval_output_dir",
    "log_samples": "--eval_output_dir",
}
# Of our engines, and of the server that has them.
ENGINE = (
    "chat_template quant_method quant_bits infer_backend enable_thinking max_model_len weight_format kv_cache_gib max_num_batched_tokens"
    " enable_prefix_caching num_speculative_tokens eval_num_proc seed"
).split()
SETTINGS = ("local_path", "subset_list", "few_shot_num")


def model_of(config: EvalConfig) -> str:
    """Which of lm_eval's models: transformers on the weights, or one that asks a server."""
    default = HF if config.eval_url is None else CHAT if config.use_chat_template else COMPLETIONS
    name = str(extra(config).get("model", default))
    if name not in (HF, COMPLETIONS, CHAT):
        raise ConfigError(f"--extra_eval_args has model {name}", hint=f"it takes {HF}, {COMPLETIONS} or {CHAT}")
    if name == HF and config.eval_url is not None:
        raise ConfigError("--eval_url has no effect with model hf of --extra_eval_args", hint=f"say {COMPLETIONS} or {CHAT}")
    return name


def check(config: EvalConfig) -> None:
    """See Evaluator. lm_eval says which tasks and options there are; how a task is scored is its own matter."""
    require("lm_eval", config, extra="lm_eval")
    config.refuse_without_effect(("eval_mode",), "with lm_eval, whose tasks declare how they are scored")
    model = model_of(config)
    if model == HF:
        config.refuse_without_effect(ENGINE, f'with lm_eval\'s own model; --extra_eval_args {{"model": "{COMPLETIONS}"}} asks a server')
    check_settings(config)
    refuse_ours(config, OURS)
    arguments = extra(config).get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError("--extra_eval_args has model_args that are no object", hint='such as {"model_args": {"add_bos_token": true}}')
    shots_of(config)
    judge(config, work("lm_eval", "check", {"model": model, "model_args": arguments, "data": data_of(config)}, config))


def judge(config: EvalConfig, known: Mapping[str, Any]) -> None:
    """ConfigError for a name that is not among those that lm_eval has said it knows."""
    given = extra(config)
    what = f"which lm_eval {known['version']} does not know"
    refuse_unknown(given, known["options"], "--extra_eval_args", what)
    refuse_unknown(given.get("model_args") or {}, known["model_options"], f"model_args of {model_of(config)} in --extra_eval_args", what)
    for task in config.eval_dataset:
        refuse_unknown(names_of(task), known["tasks"], "--eval_dataset", what)
        refuse_unknown(settings(config, task), SETTINGS, f"--eval_dataset_args of {task}", "which has no meaning for lm_eval")
    if known["problem"]:
        raise ConfigError(known["problem"])


def names_of(task: str) -> list[str]:
    """What lm_eval calls ``task``."""
    return TASKS.get(task, [task])


def data_of(config: EvalConfig) -> list[dict[str, Any]]:
    """Of tasks whose data lie in a folder: which folder, and which subsets of it are asked."""
    found = []
    for task in config.eval_dataset:
        given = laid_out(config, "lm_eval", task)
        if place := given.get("local_path"):
            subsets = given.get("subset_list") or subsets_of(Path(place))
            found += [{"task": name, "folder": str(Path(place).resolve()), "subsets": subsets} for name in names_of(task)]
        elif given.get("subset_list"):
            hint = f"name them as lm_eval does: --eval_dataset {names_of(task)[0]}_{given['subset_list'][0]}"
            raise ConfigError(f"subset_list of {task} needs its local_path", hint=hint)
    return found


def shots_of(config: EvalConfig) -> int | None:
    """Solved examples before each question, which are equal for all tasks of a run of lm_eval; None leaves it to the tasks."""
    shots = {settings(config, task).get("few_shot_num") for task in config.eval_dataset}
    if len(shots) > 1:
        raise ConfigError("few_shot_num differs between tasks, and lm_eval takes one for all", hint="evaluate them one after the other")
    return shots.pop()


def options_of(config: EvalConfig) -> dict[str, Any]:
    """What simple_evaluate takes, but for the model."""
    kwargs = generation(config, NAMES)
    return {
        "tasks": [name for task in config.eval_dataset for name in names_of(task)],
        "num_fewshot": shots_of(config),
        "limit": config.eval_limit,
        "batch_size": config.max_batch_size or 1,
        "system_instruction": read_system(config.system),
        "apply_chat_template": bool(config.use_chat_template) or model_of(config) == CHAT,
        "gen_kwargs": kwargs or None,
    } | {name: value for name, value in extra(config).items() if name not in ("model", "model_args")}


def run(config: EvalConfig, models: Sequence[Subject], folder: Path) -> list[ModelResult]:
    """See Evaluator. A run that was stopped begins anew, unless --extra_eval_args has lm_eval's own use_cache."""
    check(config)
    options, results = options_of(config), []
    for model in models:
        own = own_folder(folder, model, "lm_eval", [options, extra(config), data_of(config)])
        with model_arguments(model, own) as (arguments, key, server):
            asked = options | {"model": model_of(config), "model_args": arguments | (extra(config).get("model_args") or {})}
            if model_of(config) == HF:
                asked.setdefault("device", device_of(config))
            job = {"options": asked, "data": data_of(config), "folder": str(own), "key": key}
            found = work("lm_eval", "run", job, config, log=own / "log.txt", server=server)
        maker = f"lm_eval {found['version']}"
        tasks = [read_task(own, name, maker, options) for name in options["tasks"]]
        results.append(ModelResult(model.name, tasks, {"evaluator": maker, "files": str(own), "asked": model_of(config)}))
    return results


@contextlib.contextmanager
def model_arguments(model: Subject, own: Path) -> Iterator[tuple[dict[str, Any], str | None, Child | None]]:
    """(model_args, key, server) of lm_eval's model; a server is there until the block ends."""
    config, name = model.config, model_of(model.config)
    if name == HF:
        yield of_weights(model), None, None
        return
    with serving(model, own / "server.log") as served:
        route = "chat/completions" if name == CHAT else "completions"
        made: dict[str, Any] = {"model": served.model, "base_url": f"{served.url}/{route}", "num_concurrent": config.eval_num_proc}
        if name == COMPLETIONS:
            if config.model is None and config.eval_url is not None:
                hint = "name the model with --model, or say --use_chat_template true for tasks with written answers"
                raise ConfigError("lm_eval counts tokens itself, and has no tokenizer of the model at --eval_url", hint=hint)
            made |= {"tokenizer_backend": "huggingface", "tokenizer": str(model.source.path)}
        if config.max_model_len is not None:
            made["max_length"] = config.max_model_len
        yield made, served.key, served.child


def of_weights(model: Subject) -> dict[str, Any]:
    """What lm_eval's HFLM takes, with the precision in which our engines would compute."""
    from swift.model.device import choose_device, choose_dtype
    from swift.model.load import checkpoint_dtype

    config, source = model.config, model.source
    dtype, _ = choose_dtype(config.torch_dtype, checkpoint_dtype(source.path), choose_device(config.device))
    made: dict[str, Any] = {"pretrained": str(source.path), "dtype": str(dtype).removeprefix("torch.")}
    if source.adapter is not None:
        made["peft"] = str(source.adapter)
    if config.attn_impl is not None:
        made["attn_implementation"] = config.attn_impl
    return made


def device_of(config: EvalConfig) -> str:
    """Where the model's own engine would compute, too."""
    from swift.model.device import choose_device

    return str(choose_device(config.device))


def read_task(own: Path, name: str, maker: str, options: dict[str, Any]) -> TaskResult:
    """A task or a group of them, as lm_eval has written it below ``own``; MachineError if it has not."""
    try:
        results = json.loads((own / "results.json").read_text(encoding="utf-8"))
        leaves = _leaves(results, name)
        names = {leaf: str(results["results"][leaf].get("alias") or leaf) for leaf in leaves} if len(leaves) > 1 else {}
        outcomes = [outcome for leaf in leaves for outcome in _outcomes(own, leaf, names.get(leaf, ""))]
        own_numbers = results.get("groups", {}).get(name) or results["results"].get(name, {})
        numbers = {key: float(value) for key, value in own_numbers.items() if "," in key and isinstance(value, int | float)}
        shots = results["n-shot"].get(leaves[0], 0)
        sources = {results["configs"][leaf]["dataset_path"] for leaf in leaves}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise MachineError(f"{own} does not hold what {maker} writes of {name}: {problem or type(problem).__name__}") from None
    metric = next((key for key in [*numbers, *(key for outcome in outcomes for key in outcome.metrics)] if "_stderr," not in key), "")
    about = {"num_fewshot": shots, "uses_chat_template": options["apply_chat_template"], "source": ", ".join(sorted(sources))}
    return task_result(name, name, maker, options, metric=metric, outcomes=outcomes, numbers=numbers, about=about)


def _leaves(results: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    below = results.get("group_subtasks", {}).get(name) or []
    return [leaf for child in below for leaf in _leaves(results, child)] if below else [name]


def _outcomes(own: Path, leaf: str, category: str) -> list[Outcome]:
    """An outcome an example: lm_eval writes a line for each of its filters, whose name its metrics then have behind a comma."""
    made: dict[str, Outcome] = {}
    for line in (own / f"samples_{leaf}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        metrics = {f"{metric},{row['filter']}": float(row[metric]) for metric in row["metrics"] if isinstance(row[metric], int | float)}
        id = f"{leaf}:{row['doc_id']}"
        if id in made:
            made[id].metrics.update(metrics)
            continue
        prompt, prediction, detail = _answer(row)
        made[id] = Outcome(id, category, prompt, str(row["target"]), prediction, metrics, detail)
    return list(made.values())


def _answer(row: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """(prompt, prediction, detail): of choices their log-likelihoods, of which the largest is meant; else what was written.

    A filter may leave a list of texts: programs of HumanEval, or answers of which one is chosen.
    """
    arguments, answers = row["arguments"], row["filtered_resps"]
    prompt = str(arguments[0][0])
    first = answers[0]
    if isinstance(first, list) and isinstance(first[0], int | float):
        values = [float(answer[0]) for answer in answers]
        detail = {"loglikelihoods": values, "choices": [each[1] for each in arguments]}
        return prompt, str(values.index(max(values))), detail
    return prompt, str(first[0] if isinstance(first, list) else first), {"answer": row["resps"][0][0]}
