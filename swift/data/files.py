"""Rows of one data file: json, jsonl, csv, tsv, parquet or txt, plain or gzipped."""

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from swift.errors import DataError

Row = tuple[str, Any]

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
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(f"{path} is not a data file that is known", hint=f"known formats: {', '.join(READERS)}")
    return READERS[suffix](path)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line; a byte order mark is dropped."""
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            yield number, _decode(path, number, line)


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
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", _parse_line(path, number, line)


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
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
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
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from None
    index = 0
    for batch in table.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield f"{path}[{index}]", row
            index += 1


def _read_text(path: Path) -> Iterator[Row]:
    """Each line that is not empty is one row ``{"text": line}``."""
    for number, line in _lines(path):
        text = line.rstrip("\r\n")
        if text.strip():
            yield f"{path}:{number}", {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
