"""Rows of one data file: json, jsonl, csv, tsv, parquet or txt, plain or gzipped; from its beginning or from a place on."""

import csv
import gzip
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from swift.errors import DataError

Row = tuple[str, Any]


class Place(NamedTuple):
    """Where in a file reading goes on: after so many lines (or rows, where a file has no lines of rows) and bytes.

    ``byte`` is 0 where a file has to be read from its beginning: the rows before the place are read and left out.
    """

    row: int = 0
    byte: int = 0


START = Place()
Placed = tuple[Place, str, Any]

# A .json file that is one object and not a row keeps its rows under one of these keys.
_ROW_KEYS = ("data", "rows", "train", "examples", "instances")


def suffix_of(path: Path) -> str | None:
    """The suffix by which ``path`` is a data file (".jsonl" for "a.jsonl.gz"), or None if it is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read(path: Path) -> Iterator[Row]:
    """The rows of ``path`` as (position, value); DataError names file and line of what cannot be read."""
    return ((position, value) for _, position, value in read_from(path, START))


def read_from(path: Path, place: Place, stop: int | None = None) -> Iterator[Placed]:
    """The rows from ``place`` on as (place after the row, position, value).

    ``stop`` is the byte where reading ends, at the beginning of a line; only for files that ``cut`` cuts.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(f"{path} is not a data file that is known", hint=f"known formats: {', '.join(READERS)}")
    if suffix in _FROM_PLACE:
        return _FROM_PLACE[suffix](path, place, stop)
    assert stop is None
    return _after(place, READERS[suffix](path))


def _after(place: Place, rows: Iterator[Row]) -> Iterator[Placed]:
    for number, (position, value) in enumerate(itertools.islice(rows, place.row, None), place.row + 1):
        yield Place(number), position, value


def can_be_cut(path: Path) -> bool:
    """Whether ``read_from`` can begin in the middle of the file without reading what lies before."""
    return suffix_of(path) in _BY_LINE and path.suffix.lower() != ".gz"


def cut(path: Path, size: int) -> list[tuple[Place, int | None]]:
    """The file in ranges of about ``size`` bytes, for ``read_from``; one range if it has to be read as a whole."""
    if not can_be_cut(path) or path.stat().st_size <= size:
        return [(START, None)]
    places = [START]
    lines = offset = 0
    with path.open("rb") as stream:
        while block := stream.read(size):
            last = block.rfind(b"\n") + 1
            if last:
                places.append(Place(lines + block.count(b"\n"), offset + last))
            lines, offset = lines + block.count(b"\n"), offset + len(block)
    if places[-1].byte == offset:
        places.pop()
    return [(place, following.byte) for place, following in itertools.pairwise(places)] + [(places[-1], None)]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line; a byte order mark is dropped."""
    return ((place.row, text) for place, text in _lines_from(path, START, None))


def _lines_from(path: Path, place: Place, stop: int | None) -> Iterator[tuple[Place, str]]:
    """(place after the line, text); the number of the line is that place's ``row``."""
    number, offset = place
    with _open(path) as stream:
        stream.seek(offset)
        for line in stream:
            if stop is not None and offset >= stop:
                return
            number, offset = number + 1, offset + len(line)
            yield Place(number, offset), _decode(path, number, line)


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number} is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})",
            hint=f"convert it: iconv -f {_guess_encoding(line)} -t UTF-8 {path.name} > utf8-{path.name}",
        ) from None


def _guess_encoding(line: bytes) -> str:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return "LATIN1"
    return "GB18030"


def _read_jsonl(path: Path) -> Iterator[Row]:
    return ((position, value) for _, position, value in _read_jsonl_from(path, START, None))


def _read_jsonl_from(path: Path, place: Place, stop: int | None) -> Iterator[Placed]:
    for after, line in _lines_from(path, place, stop):
        if line.strip():
            yield after, f"{path}:{after.row}", _parse_line(path, after.row, line)


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise DataError(f"{path}:{number}: JSON that is nested too deeply") from None
    except json.JSONDecodeError as error:
        hint = "a .jsonl file has one JSON object a line"
        if number == 1 and line.strip() in ("[", "{"):
            hint += "; this one looks like a .json file: rename it"
        raise DataError(f"{path}:{number}: not JSON at column {error.colno}: {error.msg}", hint=hint) from None


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows, one row, an object with the rows under "data", or JSON lines in spite of the name."""
    with _open(path) as stream:
        raw = stream.read()
    text = "".join(_decode(path, number, line) for number, line in enumerate(raw.splitlines(keepends=True), 1))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        first, _, rest = text.lstrip().partition("\n")
        if rest.strip() and _is_json_object(first):
            yield from _read_jsonl(path)
            return
        raise DataError(f"{path}:{error.lineno}: not JSON at column {error.colno}: {error.msg}") from None
    if isinstance(value, dict):
        keys = [key for key in _ROW_KEYS if isinstance(value.get(key), list)]
        has_rows = len(keys) == 1 and all(isinstance(row, dict) for row in value[keys[0]])
        value = value[keys[0]] if has_rows else [value]
    if not isinstance(value, list):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not rows", hint="write a list of objects")
    for index, row in enumerate(value):
        yield f"{path}[{index}]", row


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_table(path, "\t")


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    """A header line, then rows; a row with more or fewer fields than the header is yielded as a list of its fields."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header) or not all(header):
            raise DataError(f"{path}:1: the header has an empty or a repeated column name: {', '.join(header)}")
        for fields in reader:
            if not fields:
                continue
            row: Any = dict(zip(header, fields, strict=True)) if len(fields) == len(header) else fields
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a table: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    return ((position, value) for _, position, value in _read_parquet_from(path, START, None))


def _read_parquet_from(path: Path, place: Place, stop: int | None) -> Iterator[Placed]:
    """Row groups before ``place`` are not read."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    assert stop is None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from None
    sizes = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    first = index = 0
    while first < len(sizes) and index + sizes[first] <= place.row:
        index, first = index + sizes[first], first + 1
    if first == len(sizes):
        return
    for batch in table.iter_batches(batch_size=1024, row_groups=list(range(first, len(sizes)))):
        for row in batch.to_pylist():
            index += 1
            if index > place.row:
                yield Place(index), f"{path}[{index - 1}]", row


def _read_text(path: Path) -> Iterator[Row]:
    return ((position, value) for _, position, value in _read_text_from(path, START, None))


def _read_text_from(path: Path, place: Place, stop: int | None) -> Iterator[Placed]:
    """Each line that is not empty is one row ``{"text": line}``."""
    for after, line in _lines_from(path, place, stop):
        text = line.rstrip("\r\n")
        if text.strip():
            yield after, f"{path}:{after.row}", {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}

_BY_LINE = (".jsonl", ".txt")
_FROM_PLACE: dict[str, Callable[[Path, Place, int | None], Iterator[Placed]]] = {
    ".jsonl": _read_jsonl_from,
    ".txt": _read_text_from,
    ".parquet": _read_parquet_from,
}
