"""The content of report.json: all that the tables and plots show. Fields are added; none is renamed or removed within a version.

Shares are between 0 and 1, also where the tables write percent. An ``Estimate`` that is null could not be computed. Models, tasks
and categories stand in the order in which the command, the tasks and the data name them.
"""

from dataclasses import dataclass, field
from typing import Any

from swift.evaluate.base import About
from swift.evaluate.compare import Comparison, Uncompared
from swift.evaluate.contamination import Contamination
from swift.evaluate.statistics import Estimate

VERSION = 1


@dataclass(frozen=True)
class Category:
    """``value`` of the items of one category; ``group`` is "" if it belongs to none."""

    name: str
    group: str
    value: Estimate


@dataclass(frozen=True)
class Group:
    """A group of categories: ``value`` over its items, ``macro`` over its categories."""

    name: str
    categories: int
    value: Estimate
    macro: Estimate | None


@dataclass(frozen=True)
class Guess:
    """What a model gets that does not read the question."""

    blind: float
    """Mean of 1 / number of choices, or 1 / number of different right answers where the choices are not known."""
    constant: float
    """Share of the most frequent right answer."""
    answer: str
    """That answer."""

    @property
    def best(self) -> float:
        return max(self.blind, self.constant)


@dataclass(frozen=True)
class Bin:
    """Items whose ``confidence``, the probability of the chosen answer among the choices, lies in one tenth."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """``bins`` are the tenths that have items. ``error`` is the mean distance of confidence and accuracy, weighted by items."""

    bins: list[Bin]
    error: float
    brier: float
    """Mean squared distance of the probabilities of all choices from 1 for the right one and 0 for the others."""


@dataclass(frozen=True)
class Result:
    """A model on a task. ``value`` is the metric that stands for the task, over items; ``macro`` is its mean over categories."""

    model: str
    about: About
    items: int
    value: Estimate | None
    macro: Estimate | None
    metrics: dict[str, Estimate]
    groups: list[Group]
    categories: list[Category]
    unanswered: int
    """Items whose answer held none that could be read."""
    notes: dict[str, int]
    """What was done to prompts ("truncated"), with the number of items."""
    guess: Guess | None
    calibration: Calibration | None
    facts: dict[str, Any]
    warnings: list[str]
    file: str
    """All prompts, answers and scores, below the folder of the report; "" for a result of another report."""


@dataclass(frozen=True)
class TaskPart:
    """A task in one mode. ``shares`` are the metrics whose values all lie between 0 and 1: they are written as percent."""

    name: str
    mode: str
    title: str
    metric: str
    shares: list[str]
    lower_is_better: bool
    results: list[Result]

    @property
    def is_share(self) -> bool:
        """Of the metric that stands for the task."""
        return self.metric in self.shares


@dataclass(frozen=True)
class Model:
    """``facts`` say what it is: digest, device, precision, engine."""

    name: str
    is_baseline: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """A result with and without the examples that the training data contain."""

    task: str
    mode: str
    metric: str
    model: str
    count: int
    all: Estimate | None
    clean: Estimate | None
    contaminated: Estimate | None


@dataclass(frozen=True)
class Flip:
    """An example on which only ``right`` of two compared models is right. Texts are cut to their ends."""

    task: str
    mode: str
    first: str
    second: str
    right: str
    id: str
    category: str
    prompt: str
    gold: str
    answer_first: str
    answer_second: str


@dataclass(frozen=True)
class Report:
    """``created`` is UTC in ISO 8601; ``options`` are those that the user set."""

    created: str
    swift: str
    options: dict[str, Any]
    models: list[Model]
    tasks: list[TaskPart]
    comparisons: list[Comparison]
    uncompared: list[Uncompared]
    contamination: Contamination | None
    effects: list[Effect]
    flips: list[Flip]
    version: int = field(default=VERSION)
