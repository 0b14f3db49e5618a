"""Renders what our Modelfiles use of Go's text/template: range over messages, if, else if, else, eq, not, and, fields."""

import re
from typing import Any

_TOKEN = re.compile(r'"[^"]*"|[()]|[^\s()]+')


def render(template: str, messages: list[dict[str, str]]) -> str:
    """The text of ``template`` for ``messages``, as Ollama gives them: all of them, and the system message by itself."""
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    parts = re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)
    nodes, rest = _parse([("text" if place % 2 == 0 else "action", part) for place, part in enumerate(parts)])
    assert not rest
    return _write(nodes, {"$": {"Messages": messages, "System": system}, ".": {"Messages": messages, "System": system}})


def _parse(parts: list[tuple[str, str]]) -> tuple[list[Any], list[tuple[str, str]]]:
    nodes: list[Any] = []
    while parts:
        kind, part = parts[0]
        if kind == "action" and (part == "end" or part.startswith("else")):
            return nodes, parts
        parts = parts[1:]
        if kind == "text":
            nodes.append(part)
        elif part.startswith("range "):
            assert part == "range $place, $message := .Messages"
            body, parts = _parse(parts)
            parts = _expect_end(parts)
            nodes.append(("range", body))
        elif part.startswith("if "):
            node, parts = _parse_if(part.removeprefix("if "), parts)
            nodes.append(node)
        else:
            nodes.append(("value", _TOKEN.findall(part)))
    return nodes, parts


def _parse_if(condition: str, parts: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    body, parts = _parse(parts)
    otherwise: list[Any] = []
    _, part = parts[0]
    if part.startswith("else if "):
        node, parts = _parse_if(part.removeprefix("else if "), parts[1:])
        return ("if", _TOKEN.findall(condition), body, [node]), parts
    if part == "else":
        otherwise, parts = _parse(parts[1:])
    return ("if", _TOKEN.findall(condition), body, otherwise), _expect_end(parts)


def _expect_end(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    assert parts[0] == ("action", "end")
    return parts[1:]


def _write(nodes: list[Any], scope: dict[str, Any]) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif node[0] == "value":
            text += _evaluate(list(node[1]), scope)
        elif node[0] == "if":
            text += _write(node[2] if _evaluate(list(node[1]), scope) else node[3], scope)
        else:
            for place, message in enumerate(scope["$"]["Messages"]):
                text += _write(node[1], scope | {".": {"Role": message["role"], "Content": message["content"]}, "$place": place})
    return text


def _evaluate(tokens: list[str], scope: dict[str, Any]) -> Any:
    values = []
    while tokens:
        token = tokens.pop(0)
        if token == "(":
            depth = tokens.index(")")
            values.append(_evaluate(tokens[:depth], scope))
            tokens = tokens[depth + 1 :]
        elif token in ("eq", "not", "and"):
            values.append(token)
        elif token.startswith('"'):
            values.append(token[1:-1])
        elif token.startswith("$."):
            values.append(scope["$"][token[2:]])
        elif token.startswith("."):
            values.append(scope["."][token[1:]])
        else:
            values.append(scope[token] if token.startswith("$") else int(token))
    match values:
        case ["eq", first, second]:
            return first == second
        case ["not", value]:
            return not value
        case ["and", first, second]:
            return first and second
        case [value]:
            return value
    raise AssertionError(values)
