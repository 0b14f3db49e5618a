"""The report as Markdown. All text that comes from outside is escaped."""

import re
from collections.abc import Iterable, Iterator, Sequence

from swift.evaluate.report import words
from swift.evaluate.report.method import METHOD
from swift.evaluate.report.schema import Report, TaskPart

NONE = words.NONE
NAMES = 50  # of contaminated examples that are listed; report.json has all


def render(report: Report) -> str:
    return "\n\n".join([*_blocks(report)]) + "\n"


def text(value: object) -> str:
    """``value`` as plain text on one line, also within a table."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", line)
    return re.sub(r"\b(https?|ftp|www)(?=[:.])", lambda match: f"{match[0]}&#8203;", line)


def code(value: str) -> str:
    """``value`` as it is, in a fence that is longer than any within it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", value)), default=0))
    return f"{fence}text\n{value}\n{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(columns), ["---"] * len(columns)] + [[text(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _blocks(report: Report) -> Iterator[str]:
    yield "# Evaluation"
    yield f"Written by swift {text(report.swift)} at {text(report.created)}. Intervals are 95 % confidence intervals."
    yield "## Results"
    rows = [
        [words.name_of(part), part.metric, result.model, words.estimate(result.value, part.is_share), result.items]
        for part in report.tasks
        for result in part.results
    ]
    yield table(["task", "metric", "model", "result", "items"], rows)
    warned = [f"- {text(words.name_of(part))}, {text(models)}: {text(warning)}." for part, models, warning in words.warned(report)]
    if warned:
        yield "### Read with care"
        yield "\n".join(warned)
    yield from _comparisons(report)
    for part in report.tasks:
        yield from _task(part)
    yield from _contamination(report)
    yield from _flips(report)
    yield "## Models"
    yield table(["model", "facts"], [[model.name, words.fact(model.facts)] for model in report.models])
    if report.options:
        yield table(["option", "value"], [[f"--{name}", words.fact(value)] for name, value in report.options.items()])
    yield "## Methods"
    yield "\n".join(f"- {sentence}" for sentence in METHOD)


def _comparisons(report: Report) -> Iterator[str]:
    if not report.comparisons and not report.uncompared:
        return
    yield "## Comparisons on the same items"
    shares = {(part.name, part.mode): part for part in report.tasks}
    columns = ["task", "first", "second", "difference", "95 % interval", "p", "p (Holm)", "second is", "both/first/second/neither", "items"]
    rows = []
    for item in report.comparisons:
        part = shares[item.task, item.mode]
        ends = words.interval(item.low, item.high, part.is_share)
        row = [words.name_of(part), item.first, item.second, words.difference(item, part.is_share), ends, words.p_value(item.p_value)]
        row += [words.p_value(item.p_adjusted), words.verdict(item, part.lower_is_better), words.counts(item)]
        rows.append([*row, f"{item.count}" + (f" (only one side: {words.alone(item)})" if item.alone_first + item.alone_second else "")])
    if rows:
        yield table(columns, rows)
    if report.uncompared:
        refused = [
            f"- {text(item.task)} ({item.mode}), {text(item.second)} with {text(item.first)}: {text(item.reason)}"
            for item in report.uncompared
        ]
        yield "Not compared:\n\n" + "\n".join(refused)


def _task(part: TaskPart) -> Iterator[str]:
    share = part.is_share
    yield f"## {text(words.name_of(part))}"
    if part.title and part.title != part.name:
        yield text(part.title)
    yield table(["", ""], words.setting(part))
    rows: list[list[object]] = []
    for result in part.results:
        guess = NONE if result.guess is None else words.number(result.guess.best, True)
        macro = words.estimate(result.macro, share)
        rows.append([result.model, words.estimate(result.value, share), macro, guess, result.unanswered, words.fact(result.facts)])
    yield table(["model", "mean over items", "mean over categories", "guessing", "unanswered", "facts"], rows)
    names = list(dict.fromkeys(name for result in part.results for name in result.metrics if name != part.metric))
    if names:
        others = [
            [result.model, *(words.estimate(result.metrics.get(name), name in part.shares) for name in names)] for result in part.results
        ]
        yield table(["model", *map(text, names)], others)
    models = [text(result.model) for result in part.results]
    groups = list(dict.fromkeys(group.name for result in part.results for group in result.groups))
    if groups:
        found = [{group.name: group for group in result.groups} for result in part.results]
        yield table(
            ["group", *models],
            [[name, *(words.estimate(of[name].value, share) if name in of else NONE for of in found)] for name in groups],
        )
    categories = list(dict.fromkeys(category.name for result in part.results for category in result.categories))
    if categories:
        each = [{category.name: category.value for category in result.categories} for result in part.results]
        yield table(["category", *models], [[name, *(words.estimate(of.get(name), share) for of in each)] for name in categories])


def _contamination(report: Report) -> Iterator[str]:
    found = report.contamination
    if found is None:
        return
    yield "## Test examples in the training data"
    yield text(f"{found.rows} rows of {', '.join(found.datasets)}; runs of {found.length} tokens, and whole questions.")
    rows = [
        [task.task, task.examples, len(task.matches), sum(match.is_exact for match in task.matches), task.unchecked] for task in found.tasks
    ]
    yield table(["task", "examples", "contaminated", "whole question", "too short to check"], rows)
    if report.effects:
        shares = {(part.name, part.mode): part.is_share for part in report.tasks}
        effects = []
        for item in report.effects:
            share = shares[item.task, item.mode]
            values = [words.estimate(value, share) for value in (item.all, item.clean, item.contaminated)]
            effects.append([f"{item.task} ({item.mode})", item.model, *values])
        yield table(["task", "model", "all", "without", "only contaminated"], effects)
        names = [
            f"- {text(task.task)}: "
            + ", ".join(text(match.id) for match in task.matches[:NAMES])
            + (", ..." if len(task.matches) > NAMES else "")
            for task in found.tasks
            if task.matches
        ]
        yield "\n".join(names)


def _flips(report: Report) -> Iterator[str]:
    if not report.flips:
        return
    yield "## Items on which one is right and the other is wrong"
    for flip in report.flips:
        yield f"### {text(flip.task)} {text(flip.id)}: {text(flip.right)} is right"
        yield code(flip.prompt)
        rows = [["right answer", flip.gold], [flip.first, flip.answer_first], [flip.second, flip.answer_second]]
        yield table(["", ""], rows)
