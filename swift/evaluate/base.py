"""The contract of a task: examples, what is asked about each, and how the answers are scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from swift.engine.base import Completion, Request
from swift.engine.scoring import Score, Text


@dataclass(frozen=True)
class Example:
    """A row of a task: ``id`` is unique in it, ``category`` is a subject ("" if there are none), ``fields`` are the columns."""

    id: str
    category: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a model is asked about one example: texts to score, or one request to answer.

    ``prompt`` is what the model reads, for people; ``notes`` say what was done to it ("truncated", "shots_left_out": 2).
    """

    prompt: str
    texts: tuple[Text, ...] = ()
    request: Request | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """An example as it was answered: one line of the file of a task.

    ``metrics`` are numbers of which the mean is the result (``acc`` is 0 or 1). ``detail`` holds what led to them:
    log-probabilities of choices, the written answer and what was extracted of it.
    """

    id: str
    category: str
    prompt: str
    gold: str
    prediction: str | None
    metrics: dict[str, float]
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What a report says of a task. ``metric`` is the one that stands for it; ``groups`` maps categories to groups."""

    name: str
    title: str
    mode: str
    metric: str
    num_fewshot: int
    uses_chat_template: bool
    licence: str
    source: str
    digest: str
    """Of the declaration, the data and all settings: equal digests mean equal questions."""
    groups: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    """What was left out of the data, by reason."""


class Task(Protocol):
    """Ready to be asked: data read, mode chosen, for the tokenizer of one model."""

    about: About

    def examples(self) -> Sequence[Example]:
        """In their order."""

    def requests(self, example: Example) -> Asked:
        """What is asked. DataError for an example that cannot be asked."""

    def score(self, example: Example, asked: Asked, answer: Sequence[Score] | Completion) -> Outcome:
        """Of the scores of ``asked.texts``, or the answer to ``asked.request``."""


@dataclass
class TaskResult:
    """All outcomes of a task for one model, in the order of its examples; ``facts`` are seconds and counts of tokens."""

    about: About
    outcomes: list[Outcome]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class ModelResult:
    """``name`` is what the user called the model; ``facts`` say what it is (digest, precision, engine, versions)."""

    name: str
    tasks: list[TaskResult]
    facts: dict[str, Any] = field(default_factory=dict)
