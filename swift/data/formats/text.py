"""Plain text for pre-training: ``{"text": ...}``, or an answer without a question."""

from collections.abc import Set
from typing import Any

from swift.data.formats.base import Format
from swift.data.formats.common import build, require_text
from swift.data.records import Message, Record


def matches(columns: Set[str]) -> bool:
    return "response" in columns


def convert(row: dict[str, Any]) -> Record:
    return build(row, [Message("assistant", require_text(row.pop("response"), "text"))])


FORMAT = Format(matches, convert)
