"""Column names: the ones that are known, and the other names under which they arrive."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from swift.errors import DataError

# Each known name with its aliases. If a row has several, the known name itself wins, else the first of the list;
# the others stay extra columns.
ALIASES: dict[str, tuple[str, ...]] = {
    "system": ("system_prompt",),
    "query": ("prompt", "input", "instruction", "question", "problem"),
    "response": (
        "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text", "completion", "content",
    ),
    "messages": ("conversation", "conversations"),
    "images": ("image",),
    "videos": ("video",),
    "audios": ("audio",),
    "rejected_images": ("rejected_image",),
    "rejected_videos": ("rejected_video",),
    "rejected_audios": ("rejected_audio",),
    "label": ("kto_tag",),
}  # fmt: skip

# Columns whose value is a list or dict and may arrive as its text, as csv files have it.
_STRUCTURED = (
    "messages", "rejected_messages", "chosen_messages", "positive_messages", "negative_messages", "history", "images",
    "videos", "audios", "objects", "chat_template_kwargs", "rejected_images", "rejected_videos", "rejected_audios",
)  # fmt: skip


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with known names: first ``columns`` (file name -> known name), then the aliases."""
    named = dict(row)
    for old, new in columns.items():
        if old in row:
            named.pop(old, None)
            named[new] = row[old]
    has_messages = any(_is_filled(named.get(name)) for name in ("messages", *ALIASES["messages"], "chosen_messages"))
    for name, aliases in ALIASES.items():
        if _is_filled(named.get(name)) or (name in ("query", "response") and has_messages):
            continue
        if name == "query" and _is_filled(named.get("instruction")) and not _is_filled(named.get("prompt")):
            continue  # instruction and input are joined by the query format
        alias = next((alias for alias in aliases if _is_filled(named.get(alias))), None)
        if alias is not None:
            named[name] = named.pop(alias)
    for name in _STRUCTURED:
        if isinstance(named.get(name), str) and named[name].lstrip()[:1] in ("[", "{"):
            named[name] = parse_text(named[name], name)
    return named


def _is_filled(value: Any) -> bool:
    return value is not None and value != "" and value != []


def parse_text(text: str, name: str) -> Any:
    """A list or dict written as JSON, or as Python prints it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(f"{name} is a text that is not JSON ({problem})") from None
