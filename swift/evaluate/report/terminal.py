"""The report on the terminal: results, warnings, comparisons, contamination."""

from swift import console
from swift.evaluate.report import words
from swift.evaluate.report.schema import Report


def show(report: Report) -> None:
    rows = []
    for part in report.tasks:
        for result in part.results:
            macro = words.number(result.macro.value if result.macro else None, part.is_share)
            ends = words.interval(result.value.low, result.value.high, part.is_share) if result.value else words.NONE
            value = words.number(result.value.value if result.value else None, part.is_share)
            rows.append([f"{words.name_of(part)} {part.metric}", result.model, value, ends, macro, result.items])
    console.table(["task", "model", "result", "95 % interval", "by category", "items"], rows, title="Results")
    for part, models, warning in words.warned(report):
        console.warn(f"{words.name_of(part)}, {models}: {warning}")
    for pair in dict.fromkeys((item.first, item.second) for item in report.comparisons):
        _show_comparisons(report, *pair)
    for refused in report.uncompared:
        console.warn(f"{refused.task} ({refused.mode}), {refused.second} is not compared with {refused.first}: {refused.reason}")
    _show_effects(report)


def _show_comparisons(report: Report, first: str, second: str) -> None:
    parts = {(part.name, part.mode): part for part in report.tasks}
    rows = []
    for item in report.comparisons:
        if (item.first, item.second) == (first, second):
            part = parts[item.task, item.mode]
            ends = words.interval(item.low, item.high, part.is_share)
            row = [words.name_of(part), words.difference(item, part.is_share), ends, words.p_value(item.p_adjusted)]
            rows.append([*row, words.verdict(item, part.lower_is_better), words.counts(item)])
    columns = ["task", "difference", "95 % interval", "p (Holm)", "verdict", "both/first/second/neither"]
    console.table(columns, rows, title=f"{second} compared with {first}, on the same items")


def _show_effects(report: Report) -> None:
    parts = {(part.name, part.mode): part for part in report.tasks}
    rows = []
    for item in report.effects:
        share = parts[item.task, item.mode].is_share
        values = [words.number(value.value if value else None, share) for value in (item.all, item.clean, item.contaminated)]
        rows.append([f"{item.task} ({item.mode})", item.model, item.count, *values])
    if rows:
        columns = ["task", "model", "contaminated", "all", "without", "only contaminated"]
        console.table(columns, rows, title="Test examples in the training data")
