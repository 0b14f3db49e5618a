"""Layouts of rows: which one a row has, and how it becomes a Record.

The first format of ORDER that matches the columns converts the row; formats of plug-ins are asked before these.
"""

from collections.abc import Mapping
from typing import Any

from swift.data.formats.columns import rename
from swift.data.records import Record
from swift.errors import DataError
from swift.registry import Registry

ORDER = ("chosen", "messages", "query", "text")
FORMATS = Registry(
    "data format",
    {
        "chosen": "swift.data.formats.chosen:FORMAT",
        "messages": "swift.data.formats.messages:FORMAT",
        "query": "swift.data.formats.query:FORMAT",
        "text": "swift.data.formats.text:FORMAT",
    },
    group="swift.format",
)


def to_record(row: Any, *, columns: Mapping[str, str] | None = None, source: str = "") -> Record:
    """Convert one row of any known layout. ``columns`` maps names in the file to names that are known.

    Raises DataError with the reason and without the position if the row cannot be converted.
    """
    if not isinstance(row, dict):
        if isinstance(row, list):
            raise DataError(f"the row is a list of {len(row)} values, not an object (or has not as many fields as the header)")
        raise DataError(f"the row is a {type(row).__name__}, not an object")
    named = rename(row, columns or {})
    filled = frozenset(name for name, value in named.items() if value is not None and value != "")
    for name in _order():
        layout = FORMATS.get(name)
        if layout.matches(filled):
            record: Record = layout.convert(named)
            record.source = source
            return record
    raise DataError(f"no known layout has the columns {', '.join(sorted(map(str, row))) or '(none)'}")


def _order() -> list[str]:
    return [*(name for name in FORMATS if name not in ORDER), *ORDER]
