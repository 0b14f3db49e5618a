"""Tool calls as text, for chat templates that know nothing of tools: Hermes' tags, which most models have seen."""

import json
import re
from collections.abc import Sequence
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def as_text(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Template messages in which the tools stand in the system prompt and calls and results in the contents.

    Results that follow each other are one user message.
    """
    made: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if was_result:
                made[-1]["content"] += "\n" + text
            else:
                made.append({"role": "user", "content": text})
            was_result = True
            continue
        was_result = False
        if message.get("tool_calls"):
            calls = "\n".join(_call_text(call) for call in message["tool_calls"])
            content = f"{message['content']}\n{calls}" if message["content"] else calls
            made.append({"role": message["role"], "content": content})
        else:
            made.append(dict(message))
    if tools:
        prompt = _tools_prompt(tools)
        if made and made[0]["role"] == "system":
            made[0]["content"] = f"{made[0]['content']}\n\n{prompt}" if made[0]["content"] else prompt
        else:
            made.insert(0, {"role": "system", "content": prompt})
    return made


def read_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """(content, tool calls) of a text that a model wrote with these tags; a call that is not JSON stays as it is."""
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
        except json.JSONDecodeError:
            return found[0]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return found[0]
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}})
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() if calls else rest), calls


def _call_text(call: dict[str, Any]) -> str:
    function = call["function"]
    body = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"


def _tools_prompt(tools: Sequence[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You can call the functions that are described, one JSON object a line, between these tags:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call one, write its name and arguments as a JSON object between these tags, once for each call:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )
