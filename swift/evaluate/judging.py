"""What extractors and metrics work with: a question, what was found in its answer, and how that is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.errors import ConfigError, near
from swift.evaluate.base import Example


@dataclass(frozen=True)
class Question:
    """What an extractor knows of a question: the ``letters`` of its choices with their texts, and the columns of its row."""

    letters: str = ""
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What was found in an answer: ``rule`` says by which rule, or, without a ``value``, why nothing was."""

    value: str | None
    rule: str


@dataclass(frozen=True)
class Judged:
    """An answer as a metric sees it: ``text`` is all of it but the thinking, ``golds`` are the right answers."""

    text: str
    found: Found
    golds: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Numbers of which the mean is the result, by their names, and what led to them."""

    metrics: dict[str, float]
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What an extractor or a metric is made with: ``options`` of the declaration, ``arguments`` that the user gave the task."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Example] = ()

    def take(self, *names: str) -> None:
        """ConfigError for an option that is none of ``names``."""
        for name in self.options:
            if name not in names:
                match = near(name, names)
                hint = f"did you mean {match!r}?" if match else f"known: {', '.join(names)}" if names else "remove it"
                raise ConfigError(f"task {self.task}: unknown option {name!r}", hint=hint)


Extractor = Callable[[str, Question], Found]


@dataclass(frozen=True)
class Metric:
    """``judge`` gives numbers with the ``names``, of which the first stands for all; ``arguments`` are what it reads of the user's."""

    names: tuple[str, ...]
    judge: Callable[[Judged], Verdict]
    arguments: tuple[str, ...] = ()
