"""Test examples that the training data contain: common n-grams and whole questions.

Texts are compared as words in lower case without punctuation, and as single characters in Chinese and Japanese. An example is
contaminated if the training data hold one of its runs of 13 such tokens (as in Brown et al. 2020, arXiv:2005.14165, appendix C),
or its question as a whole. Rows are streamed: what is held in memory grows with the tests alone.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from swift import console
from swift.config.evaluate import EvalConfig
from swift.data import sources
from swift.evaluate.base import Example, Task
from swift.evaluate.characters import HAN

LENGTH = 13
SHORTEST = 8  # a text of 8 to 12 tokens is one n-gram; a shorter one says too little to be found
PHRASE = 10  # an n-gram of more examples of a task than this is a phrase of its questions, not what is asked
_BATCH_TOKENS = 1 << 18

_TOKEN = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_FACTOR, -1, 1 << 64)


@dataclass(frozen=True)
class Match:
    """A contaminated example: the ``share`` of its n-grams that were found, and the ``row`` of training data that had the first."""

    id: str
    share: float
    is_exact: bool
    """Whether the whole question was found in one text."""
    row: str


@dataclass(frozen=True)
class TaskContamination:
    """``unchecked`` examples have no text of at least 8 tokens (or only phrases that many questions of the task have)."""

    task: str
    examples: int
    unchecked: int
    matches: list[Match]


@dataclass(frozen=True)
class Contamination:
    """What of the tasks was found in the ``rows`` rows of ``datasets``."""

    datasets: list[str]
    rows: int
    length: int
    tasks: list[TaskContamination]


def find_contamination(config: EvalConfig, tasks: Sequence[Task]) -> Contamination:
    """Read the data sets of --eval_train_dataset once, whole (``#n`` takes no sample here), and look for the examples of ``tasks``."""
    examples = {task.about.name: task.examples() for task in tasks}
    found = search(_training_rows(config), examples, config.eval_train_dataset)
    for task in found.tasks:
        console.say(
            f"{task.task}: {len(task.matches)} of {task.examples} examples are in the training data",
            whole_questions=sum(match.is_exact for match in task.matches),
            unchecked=task.unchecked,
            rows=found.rows,
        )
    return found


def search(rows: Iterable[tuple[str, Any]], examples: Mapping[str, Sequence[Example]], datasets: Sequence[str]) -> Contamination:
    """Look in the strings of ``rows`` (position, row) for those of the ``examples`` of each task."""
    tests = _Tests(examples)
    batch = _Batch(tests.vocabulary)
    count = 0
    for position, row in rows:
        count += 1
        batch.add(position, row)
        if len(batch.ids) >= _BATCH_TOKENS:
            tests.look(batch)
            batch = _Batch(tests.vocabulary)
    tests.look(batch)
    return Contamination(list(datasets), count, LENGTH, tests.results(examples))


def tokens(text: str) -> list[str]:
    """``text`` as it is compared: compatibility characters unified, no case, no punctuation."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def strings(value: Any) -> Iterator[str]:
    """All strings in a row, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


@dataclass
class _Batch:
    """Texts of some rows as numbers of the vocabulary; 0 is what no test has, and stands between texts."""

    vocabulary: Mapping[str, int]
    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    positions: list[str] = field(default_factory=list)

    def add(self, position: str, row: Any) -> None:
        self.starts.append(len(self.ids))
        self.positions.append(position)
        for text in strings(row):
            self.ids += [self.vocabulary.get(token, 0) for token in tokens(text)]
            self.ids.append(0)

    def position(self, index: int) -> str:
        """Of the row of the token ``index``."""
        return self.positions[int(np.searchsorted(self.starts, index, side="right")) - 1]


class _Windows:
    """Hashes of all runs of tokens: sums of token values times powers, modulo 2^64, moved to a common power."""

    def __init__(self, ids: Sequence[int]) -> None:
        values = _mixed(np.array(ids, dtype=np.uint64))
        self.inverse = _powers(_INVERSE, len(values) + 1)
        self.sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * _powers(_FACTOR, len(values)), dtype=np.uint64)])

    def __len__(self) -> int:
        return len(self.sums) - 1

    def of(self, length: int) -> Hashes:
        """Of the run of ``length`` tokens at each place."""
        runs: Hashes = (self.sums[length:] - self.sums[:-length]) * self.inverse[: len(self) - length + 1]
        return runs

    def at(self, index: int, length: int) -> int:
        if index + length > len(self):
            return -1
        return int((int(self.sums[index + length]) - int(self.sums[index])) * int(self.inverse[index]) % (1 << 64))


class _Grams:
    """The n-grams of one length: which examples have them, and which were found."""

    def __init__(self, hashes: Hashes, owners: Numbers, tasks: Numbers) -> None:
        """``hashes`` are those of the examples ``owners``, each of a task ``tasks[owner]``."""
        self.known, index = np.unique(hashes, return_inverse=True)
        self.index, self.owner = np.divmod(np.unique(index * len(tasks) + owners), len(tasks))
        number_of_tasks = int(tasks.max()) + 1
        _, of_task, sizes = np.unique(self.index * number_of_tasks + tasks[self.owner], return_inverse=True, return_counts=True)
        counted = sizes[of_task] <= PHRASE
        self.index, self.owner = self.index[counted], self.owner[counted]
        self.rows: dict[int, str] = {}  # of a found n-gram, the row that had it first

    def places(self, hashes: Hashes) -> Iterator[tuple[int, int]]:
        """(place among ``hashes``, number of the n-gram) of those that are known."""
        numbers = np.minimum(np.searchsorted(self.known, hashes), len(self.known) - 1)
        hits = np.flatnonzero(self.known[numbers] == hashes)
        yield from zip(hits.tolist(), numbers[hits].tolist(), strict=True)

    def counts(self, number: int) -> tuple[Numbers, Numbers]:
        """How many n-grams each of ``number`` examples has, and how many of them were found."""
        is_found = np.zeros(len(self.known), dtype=bool)
        is_found[list(self.rows)] = True
        return np.bincount(self.owner, minlength=number), np.bincount(self.owner[is_found[self.index]], minlength=number)

    def first_rows(self) -> dict[int, str]:
        """Of each example with a found n-gram, a row that had one."""
        return {
            owner: self.rows[index] for index, owner in zip(self.index.tolist(), self.owner.tolist(), strict=True) if index in self.rows
        }


class _Tests:
    """The n-grams and questions of all tasks, as hashes, and which of them were found."""

    def __init__(self, examples: Mapping[str, Sequence[Example]]) -> None:
        self.vocabulary: dict[str, int] = {}
        # Several answers to a question are examples with the same columns; what is in them is one example here.
        numbers: dict[tuple[str, int], int] = {}
        self.names = [
            (task, example.id, numbers.setdefault((task, id(example.fields)), len(numbers)))
            for task, given in examples.items()
            for example in given
        ]
        self.count = len(numbers)
        distinct = {number: example for (_, _, number), example in zip(self.names, chain(*examples.values()), strict=True)}
        of_task = {task: number for number, task in enumerate(examples)}
        tasks = np.array([of_task[task] for task, _ in numbers], dtype=np.int64)
        self.exact: dict[int, str] = {}
        self.questions: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # first n-gram -> (example, length, hash)
        hashes: dict[int, list[Hashes]] = {}
        owners: dict[int, list[Numbers]] = {}
        for number, example in distinct.items():
            for size, values in self._grams(number, example):
                hashes.setdefault(size, []).append(values)
                owners.setdefault(size, []).append(np.full(len(values), number, dtype=np.int64))
        self.grams = {size: _Grams(np.concatenate(hashes[size]), np.concatenate(owners[size]), tasks) for size in sorted(hashes)}

    def _grams(self, number: int, example: Example) -> Iterator[tuple[int, Hashes]]:
        """(length, hashes) of the n-grams of the texts of an example. Its question is the first text that is long enough."""
        is_question = True
        for text in strings(example.fields):
            ids = [self.vocabulary.setdefault(token, len(self.vocabulary) + 1) for token in tokens(text)]
            if len(ids) < SHORTEST:
                continue
            size = min(LENGTH, len(ids))
            windows = _Windows(ids)
            if is_question:
                is_question = False
                self.questions.setdefault((size, windows.at(0, size)), []).append((number, len(ids), windows.at(0, len(ids))))
            yield size, windows.of(size)

    def look(self, batch: _Batch) -> None:
        """Note what ``batch`` has of the tests."""
        windows = _Windows(batch.ids)
        for size, grams in self.grams.items():
            if len(windows) < size:
                continue
            for place, gram in grams.places(windows.of(size)):
                if gram not in grams.rows:
                    grams.rows[gram] = batch.position(place)
                for number, length, whole in self.questions.get((size, int(grams.known[gram])), ()):
                    if number not in self.exact and windows.at(place, length) == whole:
                        self.exact[number] = batch.position(place)

    def results(self, examples: Mapping[str, Sequence[Example]]) -> list[TaskContamination]:
        """Of each task, in the order of its examples."""
        has, found = np.zeros((2, self.count), dtype=np.int64)
        rows: dict[int, str] = {}
        for grams in self.grams.values():
            counted, seen = grams.counts(self.count)
            has, found = has + counted, found + seen
            rows |= grams.first_rows()
        rows |= self.exact
        matches: dict[str, list[Match]] = {task: [] for task in examples}
        unchecked = dict.fromkeys(examples, 0)
        for task, name, number in self.names:
            if number in rows:
                share = float(found[number] / has[number]) if has[number] else 1.0
                matches[task].append(Match(name, share, number in self.exact, rows[number]))
            elif not has[number]:
                unchecked[task] += 1
        return [TaskContamination(task, len(given), unchecked[task], matches[task]) for task, given in examples.items()]


def _training_rows(config: EvalConfig) -> Iterator[tuple[str, Any]]:
    for name in config.eval_train_dataset:
        yield from sources.rows(sources.parse_spec(name), use_hf=config.use_hf, token=config.hub_token, offline=config.offline)


def _mixed(ids: Hashes) -> Hashes:
    """Numbers spread over 64 bits (the finalizer of splitmix64, Steele et al. 2014)."""
    value = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


_POWERS: dict[int, Hashes] = {}


def _powers(base: int, count: int) -> Hashes:
    """The first ``count`` powers of ``base`` modulo 2^64."""
    known = _POWERS.get(base, np.ones(1, np.uint64))
    while len(known) < count:
        step = np.uint64(pow(base, len(known), 1 << 64))
        known = np.concatenate([known, known * step])
    _POWERS[base] = known
    return known[:count]
