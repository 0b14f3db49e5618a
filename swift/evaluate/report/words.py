"""How figures are written, the same in all forms of the report."""

from typing import Any

from swift.evaluate.compare import Comparison
from swift.evaluate.report.schema import Report, TaskPart
from swift.evaluate.statistics import Estimate

NONE = "-"
SIGNIFICANT = 0.05


def number(value: float | None, is_share: bool) -> str:
    """A share as percent with one decimal, another value with four significant digits."""
    if value is None:
        return NONE
    return f"{value * 100:.1f} %" if is_share else f"{value:,.4g}"


def interval(low: float | None, high: float | None, is_share: bool) -> str:
    if low is None or high is None:
        return NONE
    return f"{low * 100:.1f} to {high * 100:.1f}" if is_share else f"{low:,.4g} to {high:,.4g}"


def estimate(value: Estimate | None, is_share: bool) -> str:
    """Value and interval in one cell."""
    if value is None:
        return NONE
    ends = interval(value.low, value.high, is_share)
    return number(value.value, is_share) + (f" ({ends})" if ends != NONE else "")


def difference(item: Comparison, is_share: bool) -> str:
    """With its sign; of shares in points."""
    return f"{item.difference * 100:+.1f}" if is_share else f"{item.difference:+,.4g}"


def p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def verdict(item: Comparison, lower_is_better: bool) -> str:
    """What the comparison shows of the second model, by the adjusted p value."""
    if item.p_adjusted is None or item.p_adjusted >= SIGNIFICANT:
        return "no clear difference"
    return "better" if (item.difference < 0) == lower_is_better else "worse"


def counts(item: Comparison) -> str:
    """Both right, only the first, only the second, neither."""
    if item.counts is None:
        return NONE
    return f"{item.counts.both} / {item.counts.only_first} / {item.counts.only_second} / {item.counts.neither}"


def alone(item: Comparison) -> str:
    """Items that only one side has."""
    return NONE if not item.alone_first + item.alone_second else f"{item.alone_first} / {item.alone_second}"


def fact(value: Any) -> str:
    """A fact of a model or of a run over a task."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {fact(item)}" for key, item in value.items())
    return str(value)


def name_of(part: TaskPart) -> str:
    return f"{part.name} ({part.mode})"


def warned(report: Report) -> list[tuple[TaskPart, str, str]]:
    """(task, models, warning): what is said of several models stands once."""
    found = []
    for part in report.tasks:
        models: dict[str, list[str]] = {}
        for result in part.results:
            for warning in result.warnings:
                models.setdefault(warning, []).append(result.model)
        for warning, names in models.items():
            found.append((part, "all models" if 1 < len(names) == len(part.results) else ", ".join(names), warning))
    return found


def setting(part: TaskPart) -> list[tuple[str, str]]:
    """What is said of a task, where all models agree; else one value after the other, with the models."""

    def each(values: list[str]) -> str:
        if len(set(values)) == 1:
            return values[0]
        return "; ".join(f"{value} ({result.model})" for value, result in zip(values, part.results, strict=True))

    abouts = [result.about for result in part.results]
    left_out = [", ".join(f"{count} {reason}" for reason, count in about.counts.items() if count) or "nothing" for about in abouts]
    return [
        ("mode", part.mode),
        ("metric", part.metric + (", lower is better" if part.lower_is_better else "")),
        ("items", each([f"{result.items:,}" for result in part.results])),
        ("solved examples before each question", each([str(about.num_fewshot) for about in abouts])),
        ("chat template", each(["yes" if about.uses_chat_template else "no" for about in abouts])),
        ("left out of the data", each(left_out)),
        ("source", each([about.source for about in abouts])),
        ("licence", each([about.licence for about in abouts])),
        ("digest", each([about.digest[:12] for about in abouts])),
    ]
