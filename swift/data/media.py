"""Media of a row: ``<image>`` markers and parts matched with the files that the row names."""

import re
from pathlib import Path
from typing import Any

from swift.data.records import Message, Record
from swift.errors import DataError

_COLUMN = {"image": "images", "video": "videos", "audio": "audios"}
_MARKER = re.compile(r"<(image|video|audio)>")


def place_media(record: Record, row: dict[str, Any]) -> None:
    """Take the media columns out of ``row`` and turn markers into parts, so that parts and files are in one order.

    Files without a marker go before the text of the first user message, as in ms-swift. A marker in a row without files
    of its kind is text. Raises DataError if there are more markers than files.
    """
    columns = {kind: _listed(row, column) for kind, column in _COLUMN.items()}
    own = {kind: _listed(row, f"rejected_{column}") for kind, column in _COLUMN.items()}
    found = _place(record.messages, columns)
    record.images, record.videos, record.audios = found["image"], found["video"], found["audio"]
    if record.rejected:
        theirs = _place(record.rejected, {kind: own[kind] or files for kind, files in columns.items()})
        for kind, files in theirs.items():
            if files != found[kind]:
                row[f"rejected_{_COLUMN[kind]}"] = files
    for conversation in (*record.positives, *record.negatives):
        _place(conversation, {kind: [] for kind in _COLUMN})


def _listed(row: dict[str, Any], column: str) -> list[Any]:
    value = row.pop(column, None)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _place(messages: list[Message], columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Turn markers into parts; the files of each kind in the order of the parts."""
    if not any(columns.values()) and all(isinstance(message.content, str) for message in messages):
        return {kind: [] for kind in _COLUMN}
    parts = [_split(message, columns) for message in messages]
    waiting = {kind: list(files) for kind, files in columns.items()}
    named = {kind: sum(part["type"] == kind and "source" not in part for line in parts for part in line) for kind in _COLUMN}
    _add_unnamed(messages, parts, named, waiting)
    found: dict[str, list[Any]] = {kind: [] for kind in _COLUMN}
    for message, line in zip(messages, parts, strict=True):
        for part in line:
            if part["type"] == "text":
                continue
            if "source" in part:
                found[part["type"]].append(part.pop("source"))
            elif waiting[part["type"]]:
                found[part["type"]].append(waiting[part["type"]].pop(0))
            else:
                kind = part["type"]
                raise DataError(f"the messages name {named[kind]} {_COLUMN[kind]}, the row has {len(columns[kind])}")
        if any(part["type"] != "text" for part in line):
            message.content = line
    return found


def _split(message: Message, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    given = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
    made: list[dict[str, Any]] = []
    for part in given:
        if part["type"] != "text":
            made.append(dict(part))
            continue
        for index, piece in enumerate(_MARKER.split(part["text"])):
            if index % 2 and columns[piece]:
                made.append({"type": piece})
            elif index % 2:
                made.append({"type": "text", "text": f"<{piece}>"})
            elif piece:
                made.append({"type": "text", "text": piece})
    return made


def _add_unnamed(messages: list[Message], parts: list[list[dict[str, Any]]], named: dict[str, int], waiting: dict[str, list[Any]]) -> None:
    """Put a part for each file that no marker names before the text of the first user message."""
    missing = [{"type": kind} for kind, files in waiting.items() for _ in range(len(files) - named[kind])]
    if not missing:
        return
    first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise DataError("the row has media but no user message")
    parts[first][:0] = missing


def beside(folder: Path, path: Any) -> Any:
    """``path``, or the file of that name beside the data file if only that one exists."""
    if not isinstance(path, str) or re.match(r"[a-zA-Z][\w+.-]*:", path) or Path(path).is_absolute():
        return path
    return str(folder / path) if not Path(path).exists() and (folder / path).exists() else path
