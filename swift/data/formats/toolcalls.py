"""Tools and tool calls in OpenAI's shape, with arguments as a dict."""

import json
from typing import Any

from swift.errors import DataError


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools as ``[{"type": "function", "function": {...}}]``, of JSON text, bare functions or Anthropic's shape."""
    value = _parse(value, "tools")
    if not value:
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"tools is a {type(value).__name__}, not a list")
    return [_tool(_parse(item, f"tools[{index}]"), index) for index, item in enumerate(value)]


def _tool(item: Any, index: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"tools[{index}] is a {type(item).__name__}, not an object")
    if isinstance(item.get("function"), dict):
        return {**item, "type": item.get("type", "function")}
    if "name" not in item:
        raise DataError(f"tools[{index}] has no name")
    function = {key: value for key, value in item.items() if key != "type"}
    if "input_schema" in function:
        function["parameters"] = function.pop("input_schema")
    return {"type": "function", "function": function}


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls from a list of them, one of them, or the JSON text of either."""
    value = _parse(value, name)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise DataError(f"{name} is an empty list")
    return [_call(call, name) for call in calls]


def _call(call: Any, name: str) -> dict[str, Any]:
    call = _parse(call, name)
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{name} has no function name: {json.dumps(call, ensure_ascii=False, default=str)[:80]}")
    arguments = function.get("arguments", function.get("parameters", function.get("input")))
    if arguments is None or arguments == "":
        arguments = {}
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": _parse(arguments, f"the arguments of {name}")},
    }
    if isinstance(call.get("id"), str):
        made = {"id": call["id"], **made}
    return made


def _parse(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON ({error})") from None
