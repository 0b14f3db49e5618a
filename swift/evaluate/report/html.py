"""The report as one HTML file: no script, no network. Jinja escapes everything but the style sheet and the plots made here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from swift.evaluate.compare import Comparison
from swift.evaluate.report import plots, words
from swift.evaluate.report.method import METHOD
from swift.evaluate.report.schema import Category, Group, Report, Result, TaskPart
from swift.evaluate.statistics import Estimate

MATCHES = 200  # contaminated examples that are listed of each task


def render(report: Report) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    view = _View(report)
    return environment.get_template("page.html").render(
        report=report,
        words=words,
        method=METHOD,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        most=MATCHES,
        warned=words.warned(report),
        link=quote,
        index_of=lambda part: report.tasks.index(part) + 1,
        **{name: getattr(view, name) for name in _View.OFFERS},
    )


@dataclass(frozen=True)
class _Shown:
    """A result with its bar."""

    result: Result
    plot: str


@dataclass(frozen=True)
class _Division:
    """A category or group: one value for each model, None where there is none."""

    name: str
    group: str
    items: str
    figures: list[Estimate | None]
    macros: list[Estimate | None]
    plot: str


@dataclass(frozen=True)
class _Difference:
    item: Comparison
    part: TaskPart
    plot: str


@dataclass(frozen=True)
class _Pair:
    first: str
    second: str
    rows: list[_Difference]


class _View:
    """What the page shows beside the report itself; models keep their number, and so their colour, everywhere."""

    OFFERS = ("swatch", "overview", "forest", "part_of", "other_metrics", "divisions", "division_scale", "reliability")

    def __init__(self, report: Report) -> None:
        self.report = report
        self.numbers = {model.name: number for number, model in enumerate(report.models)}

    def swatch(self, model: str) -> str:
        return plots.swatch(self.numbers[model])

    def part_of(self, item: Any) -> TaskPart:
        return next(part for part in self.report.tasks if (part.name, part.mode) == (item.task, item.mode))

    def overview(self, part: TaskPart) -> list[_Shown]:
        values = [result.value for result in part.results if result.value]
        axis = plots.axis([end for value in values for end in (value.value, value.low, value.high)], part.is_share)
        shown = []
        for number, result in enumerate(part.results):
            line = result.guess.best if result.guess else None
            marks = [self._mark(result.model, result.value, part)] if result.value else []
            is_last = number == len(part.results) - 1
            shown.append(_Shown(result, plots.bars(axis, marks, line) + (plots.scale(axis) if is_last else "")))
        return shown

    def forest(self) -> list[_Pair]:
        """The pairs of models; shares have one axis in all rows of a pair, other metrics one each."""
        pairs: dict[tuple[str, str], list[Comparison]] = {}
        for item in self.report.comparisons:
            pairs.setdefault((item.first, item.second), []).append(item)
        return [_Pair(*names, self._differences(items)) for names, items in pairs.items()]

    def _differences(self, items: Sequence[Comparison]) -> list[_Difference]:
        shared = [item for item in items if self.part_of(item).is_share]
        rows = []
        for number, item in enumerate(items):
            part = self.part_of(item)
            beside = shared if part.is_share else [item]
            axis = plots.axis([end for one in beside for end in (one.difference, one.low, one.high)], part.is_share, is_difference=True)
            label = f"{item.second} less {item.first}: {words.difference(item, part.is_share)}"
            mark = plots.Mark(self.numbers[item.second], item.difference, item.low, item.high, label)
            has_scale = number == len(items) - 1 or not part.is_share or not self.part_of(items[number + 1]).is_share
            rows.append(_Difference(item, part, plots.dots(axis, [mark]) + (plots.scale(axis) if has_scale else "")))
        return rows

    def other_metrics(self, part: TaskPart) -> list[str]:
        return list(dict.fromkeys(name for result in part.results for name in result.metrics if name != part.metric))

    def divisions(self, part: TaskPart) -> list[tuple[str, list[_Division]]]:
        groups = [{group.name: group for group in result.groups} for result in part.results]
        categories = [{category.name: category for category in result.categories} for result in part.results]
        return [("groups", self._rows(part, groups)), ("categories", self._rows(part, categories))]

    def _rows(self, part: TaskPart, found: Sequence[dict[str, Any]]) -> list[_Division]:
        axis = self._axis(part, [division.value for of in found for division in of.values()])
        rows = []
        for name in dict.fromkeys(name for of in found for name in of):
            each: list[Category | Group | None] = [of.get(name) for of in found]
            values = [one.value if one else None for one in each]
            marks = [self._mark(result.model, value, part) if value else None for result, value in zip(part.results, values, strict=True)]
            macros = [one.macro if isinstance(one, Group) else None for one in each]
            group = next((one.group for one in each if isinstance(one, Category)), "")
            counts = list(dict.fromkeys(f"{value.count:,}" for value in values if value))
            rows.append(_Division(name, group, " / ".join(counts), values, macros, plots.dots(axis, marks)))
        if rows:  # narrow screens do not show the one above
            rows[-1] = replace(rows[-1], plot=rows[-1].plot + plots.scale(axis))
        return rows

    def division_scale(self, part: TaskPart, rows: Sequence[_Division]) -> str:
        return plots.scale(self._axis(part, [value for row in rows for value in row.figures if value]))

    def reliability(self, result: Result) -> str:
        assert result.calibration is not None
        return plots.reliability(result.calibration, self.numbers[result.model], result.model)

    def _axis(self, part: TaskPart, values: Sequence[Estimate]) -> plots.Axis:
        return plots.axis([end for value in values for end in (value.value, value.low, value.high)], part.is_share)

    def _mark(self, model: str, value: Estimate, part: TaskPart) -> plots.Mark:
        return plots.Mark(self.numbers[model], value.value, value.low, value.high, f"{model}: {words.estimate(value, part.is_share)}")
