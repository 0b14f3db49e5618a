"""Data sets read row by row, again and again, from any place on: one of them, or several that follow each other or mix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from swift.data import files, sources
from swift.data.mix import check_mixture, choices
from swift.data.records import Record, Rejected
from swift.data.rows import Rules, Tally, check_row, tell_unused
from swift.errors import DataError


class At(NamedTuple):
    """Where a feed is: the place in its file ``file``, after ``taken`` rows of round ``round``."""

    file: int = 0
    row: int = 0
    byte: int = 0
    taken: int = 0
    round: int = 0


@dataclass
class Taken:
    """A record, and the rejected rows that were passed over before it."""

    record: Record
    rejected: list[Rejected] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    is_first_round: bool = True
    is_last: bool = False
    """Whether it is the last of its round; rejected rows after it are in ``rejected``."""


class Feed:
    """The rows of one data set in the order of its files, round after round; ``#n`` takes the first n of each round."""

    def __init__(self, spec: sources.Spec, rules: Rules, hub_options: dict[str, Any]) -> None:
        self.name, self.limit, self.rules = spec.name, spec.num_samples, rules
        self.paths: list[Path] = sources.locate(spec, **hub_options)
        self.start = self.at = At()
        self._rows: Iterator[files.Placed] | None = None
        self._next: tuple[Taken | None, At] | None = None  # what comes after ``at``, and where that ends
        self._trailing = Taken(Record([]))  # rejected rows after the last record of a round

    def take(self) -> Taken:
        """The next record. Raises DataError if a whole round has none."""
        found, after = self._next or self._fetch(self.at)
        if found is None:
            raise DataError(f"{self.name}: no row is left to train on", hint="look at the rows with swift data inspect")
        self.at = after
        self._next = self._fetch(after)
        if self._next[0] is None:
            found.rejected += self._trailing.rejected
            found.tally.add(self._trailing.tally)
            found.is_last = True
            self.seek(self.start._replace(round=self.at.round + 1))
        if self.at.taken == 1 and found.is_first_round:
            tell_unused(found.tally, self.name)
        return found

    def seek(self, at: At) -> None:
        self.at, self._rows, self._next = at, None, None

    def hold_out(self, count: int) -> list[Taken]:
        """The next ``count`` records, which no round will hold."""
        held: list[Taken] = []
        while len(held) < count:
            held.append(self.take())
            if held[-1].is_last:
                raise DataError(
                    f"{self.name} has {len(held)} rows: holding out {count} leaves nothing to train on", hint="lower --streaming_val_size"
                )
        self.start = self.at._replace(taken=0)
        self.seek(self.start)
        return held

    def _fetch(self, at: At) -> tuple[Taken | None, At]:
        """The record after ``at``, or None at the end of the round, and where it ends."""
        rejected: list[Rejected] = []
        tally = Tally()
        is_first = at.round == 0
        while at.file < len(self.paths) and (self.limit is None or at.taken < self.limit):
            if self._rows is None:
                self._rows = files.read_from(self.paths[at.file], files.Place(at.row, at.byte))
            for place, source, row in self._rows:
                at = at._replace(row=place.row, byte=place.byte)
                checked = check_row(source, row, self.rules, tally)
                if not isinstance(checked, Rejected):
                    seen = tally if is_first else Tally()
                    return Taken(checked[0], rejected if is_first else [], seen, is_first), at._replace(taken=at.taken + 1)
                rejected.append(checked)
            self._rows = None
            at = at._replace(file=at.file + 1, row=0, byte=0)
        self._trailing = Taken(Record([]), rejected if is_first else [], tally if is_first else Tally())
        return None, at


class Mixture:
    """Feeds that follow each other, or mix by ``probabilities``.

    A pass ends with the last row of the last feed; of a mixture with what ``stopping_strategy`` says. The next pass draws
    by another seed. A feed begins a new round only when its rows are used up, so that of a large data set other rows come
    in each pass.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        *,
        probabilities: Sequence[float] | None = None,
        stopping_strategy: str = "first_exhausted",
        seed: int = 42,
    ) -> None:
        check_mixture(probabilities, stopping_strategy, len(feeds))
        self.feeds, self.probabilities, self.seed = list(feeds), probabilities, seed
        self.columns = list(feeds[0].rules.columns)
        self.ends_with = all if stopping_strategy == "all_exhausted" else any
        self.begin_pass(0)

    def begin_pass(self, number: int) -> None:
        self.number = number
        self._drawn = 0
        self._current = 0
        self._is_exhausted = [False] * len(self.feeds)
        self._draws: Iterator[int] | None = None

    def take(self) -> Taken:
        """The next record; ``is_last`` says that the pass ends with it."""
        chosen = self._current if self.probabilities is None else self._draw()
        taken = self.feeds[chosen].take()
        if taken.is_last and self.probabilities is None:
            self._current += 1
            taken.is_last = self._current == len(self.feeds)
        elif taken.is_last:
            self._is_exhausted[chosen] = True
        if self.probabilities is not None:
            taken.is_last = self.ends_with(self._is_exhausted)
        return taken

    def _draw(self) -> int:
        if self._draws is None:
            assert self.probabilities is not None
            seed = self.seed if self.number == 0 else (self.seed, self.number)
            self._draws = (int(one) for batch in choices(self.probabilities, seed, self._drawn) for one in batch)
        self._drawn += 1
        return next(self._draws)

    def position(self) -> dict[str, Any]:
        """Where the next record comes from, as JSON can hold it."""
        return {
            "pass": self.number,
            "current": self._current,
            "drawn": self._drawn,
            "is_exhausted": list(self._is_exhausted),
            "feeds": [{**feed.at._asdict(), "sizes": _sizes(feed)} for feed in self.feeds],
        }

    def seek(self, position: dict[str, Any]) -> None:
        """Go on at ``position``. Raises DataError if the files are not those that it was made of."""
        if len(position["feeds"]) != len(self.feeds):
            raise DataError(f"{len(self.feeds)} data sets are given, the run was started with {len(position['feeds'])}")
        for feed, saved in zip(self.feeds, position["feeds"], strict=True):
            at = dict(saved)
            if (sizes := at.pop("sizes")) != _sizes(feed):
                raise DataError(
                    f"the files of {feed.name} have changed since the checkpoint: {sum(sizes)} bytes then, {sum(_sizes(feed))} now",
                    hint="put the old files back, or start a new run",
                )
            feed.seek(At(**at))
        self.begin_pass(position["pass"])
        self._current, self._drawn = position["current"], position["drawn"]
        self._is_exhausted = list(position["is_exhausted"])


def _sizes(feed: Feed) -> list[int]:
    return [path.stat().st_size for path in feed.paths]
