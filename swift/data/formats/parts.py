"""Contents made of parts: OpenAI's, Anthropic's and LLaMA-Factory's, as text, media, tool calls and tool results."""

import json
from dataclasses import dataclass, field
from typing import Any

from swift.errors import DataError

_MEDIA = ("image", "video", "audio")


@dataclass
class Content:
    """``value`` is a text, or parts of which those with media have their source under "source" until it is placed."""

    value: str | list[dict[str, Any]]
    calls: list[Any] = field(default_factory=list)
    results: list[tuple[str | None, str]] = field(default_factory=list)


def read_parts(raw: Any, name: str) -> Content:
    """Read the content of a message; None is an empty text, a number is its digits, an object its JSON."""
    if raw is None:
        return Content("")
    if isinstance(raw, str):
        return Content(raw)
    if isinstance(raw, bool | int | float | dict):
        return Content(json.dumps(raw, ensure_ascii=False))
    if not isinstance(raw, list):
        raise DataError(f"{name} has a content that is a {type(raw).__name__}")
    made: list[dict[str, Any]] = []
    content = Content("")
    for part in raw:
        _read_part(part, name, made, content)
    if all(part["type"] == "text" for part in made):
        content.value = "".join(part["text"] for part in made)
    else:
        content.value = made
    return content


def _read_part(part: Any, name: str, made: list[dict[str, Any]], content: Content) -> None:
    if isinstance(part, str):
        made.append({"type": "text", "text": part})
        return
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise DataError(f"{name} has a part without a type: {str(part)[:80]}")
    kind = part["type"]
    if kind in ("text", "input_text", "output_text"):
        made.append({"type": "text", "text": _text(part.get("text", part.get("value")), name)})
    elif kind in ("reasoning", "thinking"):
        thought = _text(part.get("thinking", part.get("text", part.get("value"))), name)
        made.append({"type": "text", "text": f"<think>\n{thought}\n</think>\n\n"})
    elif kind == "tool_use":
        content.calls.append({"id": part.get("id"), "name": part.get("name"), "input": part.get("input")})
    elif kind == "tool_call":
        content.calls.append(part.get("value", part.get("tool_call")))
    elif kind == "tool_result":
        result = read_parts(part.get("content"), f"{name}: tool_result")
        if not isinstance(result.value, str):
            raise DataError(f"{name} has a tool result with media, which is not supported")
        content.results.append((part.get("tool_use_id"), result.value))
    elif kind.removeprefix("input_").removesuffix("_url") in _MEDIA:
        made.append(_media(part, kind, name))
    else:
        raise DataError(f"{name} has a part of the unknown type {kind!r}")


def _media(part: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """A media part; "source" is a path, a URL or a data URI, and absent if a column of the row has it."""
    medium = kind.removeprefix("input_").removesuffix("_url")
    value = next((part[key] for key in (kind, medium, "url", "path", "value", "source") if part.get(key) is not None), None)
    if isinstance(value, dict):
        if "data" in value:
            media_type = value.get("media_type") or f"{medium}/{value.get('format', 'wav')}"
            value = f"data:{media_type};base64,{value['data']}"
        elif "bytes" not in value:
            value = value.get("url", value.get("path"))
            if value is None:
                raise DataError(f"{name} has a part {kind} without url or data")
    return {"type": medium} if value is None else {"type": medium, "source": value}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} has a text part without text")
    return value
