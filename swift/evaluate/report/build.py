"""From outcomes to a Report: every figure is computed here, and nowhere else."""

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import swift
from swift.config.options import Config, to_dict
from swift.evaluate.base import ModelResult, Outcome, TaskResult
from swift.evaluate.compare import Comparison, compare_all, is_lower_better
from swift.evaluate.contamination import Contamination
from swift.evaluate.report import details
from swift.evaluate.report.caveats import warnings
from swift.evaluate.report.schema import Category, Effect, Flip, Group, Model, Report, Result, TaskPart
from swift.evaluate.results import file_of
from swift.evaluate.statistics import RATIOS, Estimate, estimate, estimate_macro, metrics_of

FLIPS = 3  # shown of each side of a comparison
TEXT = 1500  # characters shown of a prompt or an answer
SECRET = re.compile(r"(key|token|secret|password)$", re.IGNORECASE)  # what options of packages for secrets are called


def build(
    models: Sequence[ModelResult],
    baselines: Sequence[ModelResult] = (),
    contamination: Contamination | None = None,
    config: Config | None = None,
) -> Report:
    """The report of ``models``, in their order, beside ``baselines``."""
    named = _renamed(models, baselines)
    everyone = [*models, *named]
    compared, refused = compare_all(models, named)
    options = {} if config is None else _public({name: value for name, value in to_dict(config).items() if config.said(name)})
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        swift=swift.__version__,
        options=options,
        models=[Model(model.name, False, model.facts) for model in models] + [Model(model.name, True, model.facts) for model in named],
        tasks=[_part(key, everyone, len(models), contamination) for key in _keys(everyone)],
        comparisons=compared,
        uncompared=refused,
        contamination=contamination,
        effects=_effects(everyone, contamination),
        flips=[flip for item in compared for flip in _flips(item, everyone)],
    )


def _public(value: Any) -> Any:
    """``value`` without the secrets that a package may have been given, such as the key of a judge in --extra_eval_args."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: "***" if SECRET.search(str(name)) and isinstance(item, str) else _public(item) for name, item in value.items()}


def _renamed(models: Sequence[ModelResult], baselines: Sequence[ModelResult]) -> list[ModelResult]:
    """Baselines under names that say what they are, and that no other result has."""
    taken = {model.name for model in models}
    made = []
    for baseline in baselines:
        name, number = f"{baseline.name} (earlier)", 1
        while name in taken:
            number += 1
            name = f"{baseline.name} (earlier {number})"
        taken.add(name)
        made.append(ModelResult(name, baseline.tasks, baseline.facts))
    return made


def _keys(models: Sequence[ModelResult]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((task.about.name, task.about.mode) for model in models for task in model.tasks))


def _of(model: ModelResult, key: tuple[str, str]) -> TaskResult | None:
    return next((task for task in model.tasks if (task.about.name, task.about.mode) == key), None)


def _part(key: tuple[str, str], models: Sequence[ModelResult], own: int, contamination: Contamination | None) -> TaskPart:
    found = [(model, number < own, task) for number, model in enumerate(models) if (task := _of(model, key)) is not None]
    about = found[0][2].about
    shares = _shares([outcome for _, _, task in found for outcome in task.outcomes])
    results = [_result(model, task, is_own, about.metric in shares, contamination) for model, is_own, task in found]
    return TaskPart(*key, about.title, about.metric, shares, is_lower_better(about.metric), results)


def _shares(outcomes: Sequence[Outcome]) -> list[str]:
    """Metrics whose values all lie between 0 and 1."""
    largest: dict[str, float] = {}
    for outcome in outcomes:
        for name, value in outcome.metrics.items():
            if not math.isnan(value):
                largest[name] = max(largest.get(name, 0.0), value if value >= 0 else math.inf)
    means = [name for name, value in largest.items() if value <= 1]
    ratios = [name for name in metrics_of(outcomes) if name not in largest and name not in RATIOS]
    return means + [name for name in ratios if (found := estimate(outcomes, name)) and 0 <= found.value <= 1]


def _result(model: ModelResult, task: TaskResult, is_own: bool, is_share: bool, contamination: Contamination | None) -> Result:
    outcomes, about = task.outcomes, task.about
    made = Result(
        model=model.name,
        about=about,
        items=len(outcomes),
        value=estimate(outcomes, about.metric) or _told(task),
        macro=estimate_macro(outcomes, about.metric) if len({outcome.category for outcome in outcomes}) > 1 else None,
        metrics={name: value for name in metrics_of(outcomes) if (value := estimate(outcomes, name))},
        groups=_groups(task),
        categories=_categories(task),
        unanswered=sum(outcome.prediction is None for outcome in outcomes) if about.mode != "perplexity" else 0,
        notes=details.notes(outcomes),
        guess=details.guess(outcomes, about.metric),
        calibration=details.calibration(outcomes),
        facts=dict(task.facts),
        warnings=[],
        file=file_of(Path(), model.facts, about).as_posix() if is_own and {"slug", "digest"} <= model.facts.keys() else "",
    )
    made.warnings.extend(warnings(made, outcomes, is_share))
    dirty = _contaminated(contamination, about.name)
    if dirty:
        made.warnings.append(f"examples in the training data: {len(dirty)}")
    return made


def _told(task: TaskResult) -> Estimate | None:
    """What another package says of a metric that its items do not have: the number alone, in its own unit."""
    value = task.facts.get(task.about.metric)
    return None if value is None else Estimate(value, None, None, 0, 0, "none")


def _categories(task: TaskResult) -> list[Category]:
    """In the order of their first items; none for a task without categories."""
    by_category: dict[str, list[Outcome]] = {}
    for outcome in task.outcomes:
        by_category.setdefault(outcome.category, []).append(outcome)
    if list(by_category) == [""]:
        return []
    return [
        Category(name, task.about.groups.get(name, ""), value)
        for name, outcomes in by_category.items()
        if (value := estimate(outcomes, task.about.metric))
    ]


def _groups(task: TaskResult) -> list[Group]:
    """In the order in which the task names them."""
    made = []
    for group in dict.fromkeys(task.about.groups.values()):
        outcomes = [outcome for outcome in task.outcomes if task.about.groups.get(outcome.category) == group]
        value = estimate(outcomes, task.about.metric)
        if value:
            number = len({outcome.category for outcome in outcomes})
            made.append(Group(group, number, value, estimate_macro(outcomes, task.about.metric) if number > 1 else None))
    return made


def _contaminated(contamination: Contamination | None, task: str) -> set[str]:
    if contamination is None:
        return set()
    return {match.id for part in contamination.tasks if part.task == task for match in part.matches}


def _effects(models: Sequence[ModelResult], contamination: Contamination | None) -> list[Effect]:
    made = []
    for key in _keys(models):
        dirty = _contaminated(contamination, key[0])
        for model in models if dirty else ():
            task = _of(model, key)
            if task is None:
                continue
            metric = task.about.metric
            inside = [outcome for outcome in task.outcomes if outcome.id in dirty]
            outside = [outcome for outcome in task.outcomes if outcome.id not in dirty]
            parts = (estimate(task.outcomes, metric), estimate(outside, metric), estimate(inside, metric))
            made.append(Effect(*key, metric, model.name, len(inside), *parts))
    return made


def _flips(item: Comparison, models: Sequence[ModelResult]) -> list[Flip]:
    """The first examples on which only one of the two is right."""
    if item.counts is None:
        return []
    sides: list[dict[str, Outcome]] = []
    for name in (item.first, item.second):
        task = _of(next(model for model in models if model.name == name), (item.task, item.mode))
        assert task is not None
        sides.append({outcome.id: outcome for outcome in task.outcomes})
    made = []
    for right in (0, 1):
        names = [
            name
            for name in sides[0]
            if name in sides[1]
            and sides[right][name].metrics.get(item.metric) == 1
            and sides[1 - right][name].metrics.get(item.metric) == 0
        ]
        made += [_flip(item, right, sides[0][name], sides[1][name]) for name in names[:FLIPS]]
    return made


def _flip(item: Comparison, right: int, first: Outcome, second: Outcome) -> Flip:
    return Flip(
        task=item.task,
        mode=item.mode,
        first=item.first,
        second=item.second,
        right=(item.first, item.second)[right],
        id=first.id,
        category=first.category,
        prompt=_end(first.prompt),
        gold=_end(first.gold),
        answer_first=_answer(first),
        answer_second=_answer(second),
    )


def _answer(outcome: Outcome) -> str:
    """What the model wrote (``detail["answer"]``), or what it chose."""
    written: Any = outcome.detail.get("answer")
    if isinstance(written, str) and written:
        return _end(written)
    return "(none)" if outcome.prediction is None else _end(outcome.prediction)


def _end(text: str) -> str:
    return text if len(text) <= TEXT else "..." + text[-TEXT:]
