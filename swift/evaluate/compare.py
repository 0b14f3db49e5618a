"""Two models on the same examples: the difference, its interval, and whether chance alone explains it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from swift.errors import DataError
from swift.evaluate.base import About, ModelResult, Outcome, TaskResult
from swift.evaluate.statistics import (
    RATIOS,
    Clusters,
    Floats,
    Z,
    are_shares,
    clusters_of,
    effective_count,
    estimate,
    finite,
    is_binary,
    ratio_of,
    t_p_value,
    t_quantile,
    variance_of_sum,
)

LOWER_IS_BETTER = frozenset([*RATIOS, "wer", "cer", "ter", "edit_distance", "brier_score", "likelihood_diff"])


def is_lower_better(metric: str) -> bool:
    """Whether small values are the better ones. Other packages say behind a comma or a colon how values were put together."""
    return re.split("[,:]", metric)[0] in LOWER_IS_BETTER


@dataclass(frozen=True)
class Counts:
    """Items of a metric that is 0 or 1, by which of the two models is right."""

    both: int
    only_first: int
    only_second: int
    neither: int


@dataclass(frozen=True)
class Comparison:
    """``difference`` is that of ``metric``, second less first, over the ``count`` items that both answered.

    ``p_adjusted`` is Holm's for all tasks on which these two models are compared. ``alone_first`` and ``alone_second`` count the
    items that only this one has. p values and the ends of the interval are None where nothing can be said (a single item).
    """

    task: str
    mode: str
    metric: str
    first: str
    second: str
    count: int
    alone_first: int
    alone_second: int
    value_first: float
    value_second: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    method: str
    """"McNemar" (exact, 0 or 1 an item), "paired t" or "paired ratio"."""
    counts: Counts | None


@dataclass(frozen=True)
class Uncompared:
    """Two models that were not compared on a task, and why."""

    task: str
    mode: str
    first: str
    second: str
    reason: str


def compare_all(models: Sequence[ModelResult], baselines: Sequence[ModelResult] = ()) -> tuple[list[Comparison], list[Uncompared]]:
    """Each model with the first, then each with each baseline, on all tasks of either, in the order of the models and tasks."""
    pairs = [(models[0], other) for other in models[1:]] + [(baseline, model) for baseline in baselines for model in models]
    compared: list[Comparison] = []
    refused: list[Uncompared] = []
    for first, second in pairs:
        found: list[Comparison] = []
        theirs = {(task.about.name, task.about.mode): task for task in first.tasks}
        ours = {(task.about.name, task.about.mode): task for task in second.tasks}
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            reason = _obstacle(theirs.get(key), ours.get(key), (first.name, second.name))
            if reason:
                refused.append(Uncompared(*key, first.name, second.name, reason))
            else:
                found.append(compare(theirs[key], ours[key], names=(first.name, second.name)))
        adjusted = holm([item.p_value for item in found])
        compared += [replace(item, p_adjusted=value) for item, value in zip(found, adjusted, strict=True)]
    return compared, refused


def compare(first: TaskResult, second: TaskResult, *, names: tuple[str, str]) -> Comparison:
    """The metric of the task on the items that both answered. DataError if the two were not asked the same."""
    metric = first.about.metric
    reason = _obstacle(first, second, names)
    if reason:
        raise DataError(
            f"{first.about.name}: {names[0]} and {names[1]} cannot be compared: {reason}", hint="evaluate both with equal settings"
        )
    left, right = _by_id(first, metric), _by_id(second, metric)
    common = [name for name in left if name in right]
    a, b = [left[name] for name in common], [right[name] for name in common]
    found = _compare_ratios(a, b, metric) if ratio_of(metric, a[0].metrics) else _compare_means(a, b, metric)
    return replace(
        found,
        task=first.about.name,
        mode=first.about.mode,
        first=names[0],
        second=names[1],
        alone_first=len(left) - len(common),
        alone_second=len(right) - len(common),
    )


def what_differs(first: About, second: About) -> str:
    """In what two tasks ask other questions, or "" if their answers can be compared item by item."""
    if (first.digest, first.mode, first.metric) == (second.digest, second.mode, second.metric):
        return ""
    fields = ("name", "mode", "metric", "num_fewshot", "uses_chat_template", "source")
    told = [f"{field} {ours} and {theirs}" for field in fields if (ours := getattr(first, field)) != (theirs := getattr(second, field))]
    return "; ".join(told or [f"other data or settings, digests {first.digest[:12]} and {second.digest[:12]}"])


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p value: of the items on which the two differ, each is right on one half (McNemar 1947; a binomial test)."""
    discordant = only_first + only_second
    tail, term = 0, 1
    for right in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (discordant - right) // (right + 1)
    return min(1.0, 2 * tail / (1 << discordant))


def difference_interval(only_first: float, only_second: float, count: float, z: float = Z) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares, second less first: Wald's, with a pair more on which only one is right, each.

    Bonett and Price 2012 (J. Educational and Behavioral Statistics 37:479): it also holds for few differing pairs, or none.
    """
    size = count + 2
    a, b = (only_first + 1) / size, (only_second + 1) / size
    half = z * math.sqrt((a + b - (b - a) ** 2) / size)
    return max(-1.0, b - a - half), min(1.0, b - a + half)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6:65); None stays, and does not count."""
    order = sorted((value, index) for index, value in enumerate(p_values) if value is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (value, index) in enumerate(order):
        largest = max(largest, min(1.0, value * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted


def _obstacle(first: TaskResult | None, second: TaskResult | None, names: tuple[str, str]) -> str:
    """Why two results cannot be compared, or ""."""
    if first is None or second is None:
        return f"there is no result of {names[0] if first is None else names[1]}"
    if told := what_differs(first.about, second.about):
        return f"they were not asked the same questions ({told})"
    metric = first.about.metric
    left, right = _by_id(first, metric), _by_id(second, metric)
    common = left.keys() & right.keys()
    if not common:
        return "they have no example in common"
    for name, outcomes in zip(names, (left, right), strict=True):
        value = estimate([outcomes[id] for id in common], metric)
        if value is not None and math.isinf(value.value):
            return f"the {metric} of {name} has no end"
    return ""


def _by_id(result: TaskResult, metric: str) -> dict[str, Outcome]:
    return {outcome.id: outcome for outcome in finite(result.outcomes, metric)}


def _compare_means(a: Sequence[Outcome], b: Sequence[Outcome], metric: str) -> Comparison:
    first = np.array([outcome.metrics[metric] for outcome in a])
    second = np.array([outcome.metrics[metric] for outcome in b])
    clusters = clusters_of(a)
    difference = float((second - first).mean())
    residuals, count, groups = second - first - difference, len(a), _groups(a, clusters)
    variance = variance_of_sum(residuals, clusters) / count**2
    most = 1.0 if are_shares(first) and are_shares(second) else math.inf
    found = _paired(metric, count, float(first.mean()), float(second.mean()), variance, groups, "paired t", most)
    if not (is_binary(first) and is_binary(second)):
        return found
    counts = _counts(first, second)
    if clusters is None:
        low, high = difference_interval(counts.only_first, counts.only_second, count)
        p_value = mcnemar(counts.only_first, counts.only_second)
        return replace(found, low=low, high=high, p_value=p_value, method="McNemar", counts=counts)
    if groups < 2:
        return replace(found, counts=counts)
    # McNemar's test takes items as independent, so p is that of paired t; the interval is that of as many items as would be.
    effective = effective_count(count, groups, variance_of_sum(residuals) / count**2, variance)
    only_first, only_second = (number * effective / count for number in (counts.only_first, counts.only_second))
    low, high = difference_interval(only_first, only_second, effective, t_quantile(groups - 1))
    return replace(found, low=low, high=high, counts=counts)


def _compare_ratios(a: Sequence[Outcome], b: Sequence[Outcome], metric: str) -> Comparison:
    """The delta method for the difference of two ratios over the same documents, whose lengths may differ by tokenizer."""
    rule = ratio_of(metric, a[0].metrics)
    assert rule is not None
    values, parts, most = [], [], 1.0
    for outcomes in (a, b):
        above = np.array([outcome.metrics[rule.above] for outcome in outcomes])
        below = np.array([outcome.metrics[rule.below] for outcome in outcomes])
        if metric in RATIOS or not are_shares(above, below):
            most = math.inf
        value = float(above.sum() / below.sum())
        values.append(rule.transform(value))
        parts.append(rule.slope(value) * (above - value * below) / below.sum())
    clusters = clusters_of(a)
    variance = variance_of_sum(parts[1] - parts[0], clusters)
    return _paired(metric, len(a), values[0], values[1], variance, _groups(a, clusters), "paired ratio", most)


def _groups(outcomes: Sequence[Outcome], clusters: Clusters) -> int:
    return len(outcomes) if clusters is None else len(set(clusters))


def _counts(first: Floats, second: Floats) -> Counts:
    both = int((first * second).sum())
    only_first, only_second = int(first.sum()) - both, int(second.sum()) - both
    return Counts(both, only_first, only_second, len(first) - both - only_first - only_second)


def _paired(metric: str, count: int, first: float, second: float, variance: float, groups: int, method: str, most: float) -> Comparison:
    """With an interval that does not go beyond ``most`` on either side."""
    difference = second - first
    half = t_quantile(groups - 1) * math.sqrt(variance) if groups > 1 else None
    return Comparison(
        task="",
        mode="",
        metric=metric,
        first="",
        second="",
        count=count,
        alone_first=0,
        alone_second=0,
        value_first=first,
        value_second=second,
        difference=difference,
        low=None if half is None else max(-most, difference - half),
        high=None if half is None else min(most, difference + half),
        p_value=t_p_value(difference, variance, groups),
        p_adjusted=None,
        method=method,
        counts=None,
    )
