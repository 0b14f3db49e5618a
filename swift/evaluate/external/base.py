"""The contract of another package that evaluates, and what all of them share: options, names, and results as they are."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from swift.config.evaluate import EvalConfig
from swift.errors import ConfigError, near
from swift.evaluate.base import About, ModelResult, Outcome, TaskResult
from swift.evaluate.subject import Subject

# Of ours: the options of generation by the names that OpenAI's API has.
GENERATION = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "stop_words": "stop",
}
PYTHON = "python"  # the member of --extra_eval_args that is ours: the interpreter of the environment that has the package


class Evaluator(Protocol):
    """Another package. A module with these two functions is one."""

    def check(self, config: EvalConfig) -> None:
        """DependencyError if the package is absent, ConfigError for what it does not know. No weights are read."""

    def run(self, config: EvalConfig, models: Sequence[Subject], folder: Path) -> list[ModelResult]:
        """``check``, then evaluate ``models``; the package's own files are kept below ``folder``.

        Numbers are the package's own: in ``facts`` of a task by the names that it gives them, and item by item in its
        outcomes where it says them. ``mode`` of a task names package and version.
        """


def generation(config: EvalConfig, names: Mapping[str, str] = GENERATION) -> dict[str, Any]:
    """Options of generation that somebody gave, by the names in ``names``; --eval_generation_config is the stronger.

    A name in it that is not in ``names`` is passed on as it is: the package knows more options than we do. ConfigError for an
    option of ours that the package does not have.
    """
    config.refuse_without_effect([name for name in GENERATION if name not in names], f"with --eval_backend {config.eval_backend}")
    given = {name: getattr(config, name) for name in names if config.said(name)}
    given |= config.eval_generation_config or {}
    return {names.get(name, name): value for name, value in given.items()}


def extra(config: EvalConfig) -> dict[str, Any]:
    """--extra_eval_args without the member that is ours."""
    return {name: value for name, value in (config.extra_eval_args or {}).items() if name != PYTHON}


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    """ConfigError for the first of ``names`` that is not ``known``: "``where`` has NAME, which is ``what``"."""
    known = list(known)
    for name in names:
        if name not in known:
            match = near(name, known)
            hint = f"did you mean {match}?" if match else f"it knows {', '.join(sorted(known)[:12])}{' ...' if len(known) > 12 else ''}"
            raise ConfigError(f"{where} has {name}, {what}", hint=hint)


def settings(config: EvalConfig, task: str) -> dict[str, Any]:
    """What --eval_dataset_args says of ``task``; a folder in --eval_data_dir that is named like it is its local_path."""
    given = (config.eval_dataset_args or {}).get(task, {})
    if not isinstance(given, dict):
        raise ConfigError(f"--eval_dataset_args has {task}: {given!r}", hint='it takes an object of objects: {"mmlu": {"few_shot_num": 5}}')
    made = dict(given)
    if config.eval_num_fewshot is not None:
        made.setdefault("few_shot_num", config.eval_num_fewshot)
    if config.eval_data_dir is not None and "local_path" not in made:
        named = Path(config.eval_data_dir, task)
        made["local_path"] = str(named if named.is_dir() else Path(config.eval_data_dir))
    place = made.get("local_path")
    if place is not None and not Path(place).exists():
        raise ConfigError(f"{place}, which holds the data of {task}, does not exist", hint="say the local_path of its data")
    return made


def check_settings(config: EvalConfig) -> None:
    """ConfigError for --eval_dataset_args of a task that is not evaluated, or for data that is not there."""
    refuse_unknown(config.eval_dataset_args or {}, config.eval_dataset, "--eval_dataset_args", "which is not among --eval_dataset")
    for task in config.eval_dataset:
        settings(config, task)


def refuse_ours(config: EvalConfig, ours: Mapping[str, str]) -> None:
    """ConfigError for a member of --extra_eval_args that is said by an option of ours, which ``ours`` gives."""
    for name in extra(config):
        if name in ours:
            raise ConfigError(f"--extra_eval_args has {name}, which {ours[name]} says", hint=f"remove it, and use {ours[name]}")


def own_folder(folder: Path, model: Subject, package: str, options: Any) -> Path:
    """Where ``package`` writes: one folder for each model and set of options. Equal ones go on where they stopped."""
    asked = "" if model.config.eval_url is not None else model.facts["digest"]
    return folder / package / f"{safe_name(Path(model.name.removeprefix('pkg::')).name)}-{digest([asked, model.config.eval_url, options])}"


def safe_name(name: str) -> str:
    """``name`` as a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def digest(value: Any) -> str:
    """Equal for equal values: 8 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def task_result(
    name: str,
    title: str,
    maker: str,
    asked: Any,
    *,
    metric: str,
    outcomes: list[Outcome],
    numbers: Mapping[str, float],
    about: Mapping[str, Any],
) -> TaskResult:
    """A task as ``maker`` ("evalscope 1.14.1") has evaluated it with the options ``asked``; ``numbers`` are its own."""
    made = About(
        name=name,
        title=title,
        mode=maker,
        metric=metric,
        num_fewshot=int(about.get("num_fewshot") or 0),
        uses_chat_template=bool(about.get("uses_chat_template")),
        licence="",
        source=str(about.get("source") or ""),
        counts=about.get("counts") or {},
        digest=digest([maker, name, asked]),
    )
    return TaskResult(made, outcomes, dict(numbers))
