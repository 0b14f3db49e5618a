"""The rows of a task as their authors publish them: read, checked, and counted where some are left out."""

import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift.data import files
from swift.errors import DataError, near
from swift.evaluate.base import Example
from swift.evaluate.layout import File, Located, locate
from swift.evaluate.prompt import names_in, scope, value
from swift.evaluate.settings import Settings
from swift.evaluate.spec import AnyMode, Choosing, Layout, Reading, TaskSpec, Writing


@dataclass(frozen=True)
class Data:
    """``examples`` that are asked, ``shots`` to take solved examples from, by category ("" for all), ``rows`` all that were read.

    ``where`` says file and line of each example, by id; ``counts`` what was left out, by reason.
    """

    examples: list[Example]
    shots: Mapping[str, list[Example]]
    rows: list[Example]
    source: str
    digest: str
    where: Mapping[str, str]
    counts: dict[str, int] = field(default_factory=dict)

    def shots_for(self, category: str) -> list[Example]:
        """Those of its category, or all where the split has no categories."""
        return self.shots.get(category, self.shots.get("", []))


def read(spec: TaskSpec, settings: Settings) -> Data:
    """The rows of a task. DataError in one line, with file and line, for whatever cannot be asked."""
    splits = [spec.split]
    if settings.num_fewshot and spec.shots.split is not None:
        splits.append(spec.shots.split)
    located = locate(spec, settings, list(dict.fromkeys(splits)))
    reader = _Reader(spec, settings, located.layout)
    read_rows = reader.examples(_chosen(spec, settings, located, spec.split), spec.split)
    examples = _of_subsets(settings, located, read_rows) if spec.category is not None else read_rows
    counts = dict(reader.counts)  # not of rows that solved examples are taken from
    if not examples:
        raise DataError(f"{located.source}: split {spec.split} of task {spec.name} is empty", hint=_left_out(counts))
    shots = _shots(spec, settings, located, reader) if settings.num_fewshot else {}
    for category in dict.fromkeys(example.category for example in examples) if settings.num_fewshot else ():
        _check_shots(spec, settings, located.source, category, len(shots.get(category, shots.get("", []))))
    if missing := _num_missing(spec, settings, examples):
        counts["subjects of which there are no data"] = missing
    if located.num_unread:
        counts["files of another kind beside these, not read"] = located.num_unread
    kept = _first(examples, settings.limit)
    return Data(kept, shots, read_rows, located.source, _digest(read_rows, shots), reader.where, counts)


def _shots(spec: TaskSpec, settings: Settings, located: Located, reader: "_Reader") -> dict[str, list[Example]]:
    """What solved examples are taken from, by category: as many rows as are needed, and one more where an example may be its own."""
    split = spec.shots.split
    if split is None:
        return {"": [Example(f"shot {number}", "", row) for number, row in enumerate(spec.shots.rows)]}
    if split not in located.splits:
        raise DataError(f"{located.source} is one file: it has no split {split} with solved examples", hint="give --eval_num_fewshot 0")
    most = spec.shots.skip + settings.num_fewshot + 1
    return _by_category(reader.examples(_chosen(spec, settings, located, split), split, most))


def _check_shots(spec: TaskSpec, settings: Settings, source: str, category: str, count: int) -> None:
    """An example is never among its own solved examples, so a split that gives both must hold one more."""
    free = max(count - spec.shots.skip - (spec.shots.split == spec.split), 0)
    if free < settings.num_fewshot:
        of = f" of {category}" if category else ""
        raise DataError(f"{source}: {free} solved examples{of}, not {settings.num_fewshot}", hint=f"give --eval_num_fewshot {free}")


def _left_out(counts: Mapping[str, int]) -> str | None:
    return "left out: " + ", ".join(f"{count} ({reason})" for reason, count in counts.items()) if counts else None


def _chosen(spec: TaskSpec, settings: Settings, located: Located, split: str) -> list[File]:
    """The files of ``split`` that are wanted. DataError for a subject that nobody knows, or of which there is no file."""
    found = located.splits[split]
    known = spec.category_names
    for file in found:
        if known and file.category and file.category not in known:
            match = near(file.category, known)
            raise DataError(
                f"{file.path}: task {spec.name} has no subject {file.category!r}",
                hint=f"did you mean {match!r}?" if match else "rename the file, or move it out of the folder",
            )
    if not settings.subsets:
        return found
    there = {file.category for file in found}
    if there == {""} and spec.category is not None:
        return found  # rows tell their subjects
    if there == {""}:
        raise DataError(f"task {spec.name} has no subjects in its data, so subset_list has no effect", hint="leave subset_list out")
    wanted: dict[str, None] = {}
    for name in settings.subsets:
        inside = [name] if name in there else [category for category in spec.groups.get(name, ()) if category in there]
        if not inside:
            match = near(name, there)
            hint = f"did you mean {match!r}?" if match else f"there are: {', '.join(sorted(there)[:8])}"
            raise DataError(f"{located.source}: split {split} has no subject {name!r}", hint=hint)
        wanted |= dict.fromkeys(inside)
    return [file for name in wanted for file in found if file.category == name]


def _of_subsets(settings: Settings, located: Located, examples: list[Example]) -> list[Example]:
    """Those of the wanted subjects, which rows tell. DataError for a subject of which there is no row."""
    there = {example.category for example in examples}
    for name in settings.subsets:
        if name not in there:
            match = near(name, there)
            hint = f"did you mean {match!r}?" if match else f"there are: {', '.join(sorted(there)[:8])}"
            raise DataError(f"{located.source}: no row has the subject {name!r}", hint=hint)
    return [example for example in examples if not settings.subsets or example.category in settings.subsets]


def _num_missing(spec: TaskSpec, settings: Settings, examples: Iterable[Example]) -> int:
    """How many declared subjects, of those that are wanted, have no examples."""
    names = settings.subsets or tuple(spec.groups)
    wanted = {category for name in names for category in spec.groups.get(name, (name,))}
    return len(wanted - {example.category for example in examples})


class _Reader:
    """Makes examples of rows, with one layout."""

    def __init__(self, spec: TaskSpec, settings: Settings, layout: Layout) -> None:
        self.spec, self.layout = spec, layout
        self.names = spec.category_names
        self.needed = needed_columns(spec, settings, layout)
        self.where: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def examples(self, chosen: Iterable[File], split: str, most: int | None = None) -> list[Example]:
        """All rows but those that are left out, or the first ``most`` of each file."""
        found: list[Example] = []
        numbers: Counter[str] = Counter()
        seen: dict[str, str] = {}
        for file in chosen:
            begin = len(found)
            for where, row in rows(file.path, self.layout.header):
                if most is not None and len(found) - begin >= most:
                    break
                fields = self._fields(where, row, file.category)
                number, numbers[file.category] = numbers[file.category], numbers[file.category] + 1
                id = ("" if split == self.spec.split else f"{split}:") + self._id(where, fields, file.category, number)
                if id in seen:
                    raise DataError(f"{where}: id {id!r} was at {seen[id]} already", hint="give every row an id of its own")
                seen[id] = where
                reason = next(
                    (
                        drop.because
                        for drop in self.spec.drop
                        if value(drop.when, {**self.scope(fields, file.category), "split": split}, where)
                    ),
                    None,
                )
                if reason is not None:
                    self.counts[reason] += 1
                    continue
                if (empty := next((name for name in self.needed if row[name] is None), None)) is not None:
                    raise DataError(f"{where}: column {empty!r} has no value", hint="fill it, or leave the row out")
                self.where[id] = where
                found.append(Example(id, self._category(where, fields, file.category), fields))
        return found

    def _fields(self, where: str, row: Any, category: str) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row is a {type(row).__name__}, not an object with columns")
        for name in self.needed:
            if name not in row:
                raise self._missing(where, name, row)
        fields = dict(row)
        for name, expression in [*self.layout.fields.items(), *self.spec.fields.items()]:
            fields[name] = value(expression, self.scope(fields, category), where)
        return fields

    def scope(self, fields: Mapping[str, Any], category: str) -> dict[str, Any]:
        return scope(fields, category, self.names)

    def _missing(self, where: str, name: str, row: Mapping[str, Any]) -> DataError:
        shown = ", ".join(repr(column) for column in list(row)[:12])
        match = near(name, row) or next((column for column in row if column.lower() == name.lower()), None)
        return DataError(f"{where}: column {name!r} is missing; found {shown}", hint=f"is it {match!r}? rename it" if match else None)

    def _category(self, where: str, fields: Mapping[str, Any], category: str) -> str:
        if category or self.spec.category is None:
            return category
        return str(value(self.spec.category, self.scope(fields, category), where))

    def _id(self, where: str, fields: Mapping[str, Any], category: str, number: int) -> str:
        own = number if self.spec.id is None else value(self.spec.id, self.scope(fields, category), where)
        return f"{category}/{own}" if category else str(own)


def needed_columns(spec: TaskSpec, settings: Settings, layout: Layout) -> list[str]:
    """The columns that rows must have, sorted: what the declaration reads and does not compute itself."""
    mode = settings.mode_of(spec)
    templates, expressions = texts_of(spec, mode)
    if isinstance(mode, Writing) and not settings.num_fewshot:
        templates.remove(mode.target)
    needed = names_in(templates, expressions) - {"split"}
    for name, expression in reversed([*layout.fields.items(), *spec.fields.items()]):
        needed = needed - {name} | names_in(expressions=[expression])
    return sorted(needed)


def texts_of(spec: TaskSpec, mode: AnyMode) -> tuple[list[str], list[str]]:
    """(templates, expressions) by which rows are left out, asked and judged in ``mode``."""
    templates: list[str] = []
    expressions = [*(drop.when for drop in spec.drop), spec.id, spec.category, spec.cluster]
    if isinstance(mode, Reading):
        templates += [mode.text, mode.context]
        expressions.append(mode.original)
    else:
        templates += [mode.description, mode.prompt]
        expressions += [mode.choices if isinstance(mode.choices, str) else None, mode.gold]
    if isinstance(mode, Choosing):
        templates.append(mode.ending)
        expressions.append(mode.contexts)
    if isinstance(mode, Writing):
        templates += [mode.prefix, mode.target]
    return templates, [text for text in expressions if text]


def rows(path: Path, header: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a data file; ``header`` names the columns of a table that has no header line."""
    suffix = files.suffix_of(path)
    if suffix in (".csv", ".tsv"):
        return _table(path, "," if suffix == ".csv" else "\t", list(header))
    if suffix == ".parquet" and not isinstance(path, Path):  # a member of an archive
        raise DataError(f"{path}: parquet is not read out of an archive", hint="unpack it")
    return files.read(path)


def _table(path: Path, delimiter: str, header: list[str]) -> Iterator[tuple[str, Any]]:
    """Rows of a table, as authors write them: a first column without a name is one, and a text may hold line breaks.

    DataError for a row whose number of fields is not that of the header.
    """
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in files.lines(path)), delimiter=delimiter)
    try:
        if not header:
            header = next(reader, [])
            if twice := [name for index, name in enumerate(header) if name in header[:index]]:
                raise DataError(f"{path}:1: the header has column {twice[0]!r} twice")
        while True:
            line = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                return
            if len(fields) != len(header) and fields:
                raise DataError(
                    f"{path}:{line}: {len(fields)} fields, not {len(header)} ({', '.join(header)})",
                    hint='a text that holds a comma or a line break stands in double quotes: "..."',
                )
            if fields:
                yield f"{path}:{line}", dict(zip(header, fields, strict=True))
    except csv.Error as problem:
        raise DataError(f"{path}:{reader.line_num}: not a table: {problem}") from None


def _by_category(examples: Iterable[Example]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.category, []).append(example)
    return found


def _first(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first ``limit`` of each category."""
    if limit is None:
        return list(examples)
    taken: Counter[str] = Counter()
    kept = []
    for example in examples:
        taken[example.category] += 1
        if taken[example.category] <= limit:
            kept.append(example)
    return kept


def _digest(examples: Iterable[Example], shots: Mapping[str, Iterable[Example]]) -> str:
    """SHA-256 (hex) of all rows, whatever the files were that held them."""
    digest = hashlib.sha256()
    for group in (examples, *(shots[category] for category in sorted(shots))):
        for example in group:
            digest.update(json.dumps([example.id, example.fields], ensure_ascii=False, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()
