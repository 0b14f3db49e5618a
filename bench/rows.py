"""The rows that all peers train, in one plain form, and what is counted in them once for all.

Tools differ in how they render tool calls, so the benchmark renders them first, by one rule, and every peer, ours
included, gets plain conversations of system, user and assistant: the list of tools follows the system message as text,
a call is the assistant's message, what the tool answered is the user's. That every peer then consumes the same tokens
is checked against what the probe saw in its model (train.py).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# SmolLM2's template inserts this where a row has no system message; written out, every tool sees the same text.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "user",
    "tool_response": "user",
    "tool": "user",
}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant; of a pair for preferences, ``rejected`` is the worse last message."""

    messages: Messages
    rejected: str | None = None

    def sides(self) -> list[Messages]:
        """The sequences that are trained: one, or the chosen and the rejected one."""
        if self.rejected is None:
            return [self.messages]
        return [self.messages, [*self.messages[:-1], {"role": "assistant", "content": self.rejected}]]


@dataclass(frozen=True)
class Counts:
    """Tokens of some rows: what a tool has to compute, however it pads, packs or shares.

    ``newlines`` are the supervised turns behind whose end a line break is rendered (and not cut off), which some tools
    train too; ``cut`` are the sequences that were cut. ``pairs`` is the number of (query, key) pairs of causal attention:
    L (L + 1) / 2 for a row of L tokens.
    """

    real: int
    supervised: int
    newlines: int
    cut: int
    pairs: int


def load_rows(path: Path, job: str, *, num_tools: int | None = None) -> list[Row]:
    """Rows of a messages .jsonl, an alpaca .json or a sharegpt .json (with ``tools``, or ``chosen`` and ``rejected``).

    ``num_tools``: every row with tools has the same list, the first so many of the file, as the rows of one agent have.
    """
    if not path.exists():
        sys.exit(f"{path} does not exist; name a .jsonl of messages, or a .json in alpaca's or sharegpt's form, with --data")
    text = path.read_text(encoding="utf-8")
    values = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    if num_tools is not None:
        values = _with_one_list(values, num_tools)
    rows = [_row(value) for value in values]
    wanted = "pairs (chosen and rejected)" if job == "dpo" else "conversations without a rejected answer"
    if any((row.rejected is not None) != (job == "dpo") for row in rows):
        sys.exit(f"{path}: the job {job} needs {wanted}; name another file with --data")
    return rows


def _with_one_list(values: list[dict[str, Any]], num_tools: int) -> list[dict[str, Any]]:
    known = {tool["name"]: tool for value in values for tool in json.loads(value.get("tools") or "[]")}
    if len(known) < num_tools:
        sys.exit(f"the rows know {len(known)} tools, fewer than --num_tools {num_tools}; lower it")
    listed = json.dumps(list(known.values())[:num_tools], ensure_ascii=False)
    return [{**value, "tools": listed} if "tools" in value else value for value in values]


def _row(value: dict[str, Any]) -> Row:
    if "instruction" in value:
        question = value["instruction"] + ("\n" + value["input"] if value.get("input") else "")
        said = [("user", question), ("assistant", value["output"])]
    elif "conversations" in value:
        said = [(turn["from"], turn["value"]) for turn in value["conversations"]]
    else:
        said = [(turn["role"], turn["content"]) for turn in value["messages"]]
    rejected = value.get("rejected")
    if rejected is not None:
        said.append(("assistant", value["chosen"]["value"]))
        rejected = rejected["value"]
    messages = [{"role": ROLES.get(role, role), "content": content} for role, content in said]
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": SYSTEM})
    if value.get("tools"):
        messages[0] = {"role": "system", "content": f"{messages[0]['content']}\n\nTools:\n{value['tools']}"}
    return Row(messages, rejected)


def whole_pairs(rows: Sequence[Row], model: Path, max_length: int) -> list[Row]:
    """The pairs of which both sides fit into ``max_length``: tools cut pairs each in its own way."""
    tokenizer = _tokenizer(model)
    return [row for row in rows if all(_length(side, tokenizer) < max_length for side in row.sides())]


def count_all(rows: Sequence[Row], model: Path, max_length: int) -> Counts:
    """What ``rows`` hold after cutting each sequence to ``max_length`` tokens on the right."""
    tokenizer = _tokenizer(model)
    counts = [count(side, tokenizer, max_length, last_only=row.rejected is not None) for row in rows for side in row.sides()]
    return Counts(**{field.name: sum(getattr(one, field.name) for one in counts) for field in fields(Counts)})


def count(messages: Messages, tokenizer: Any, max_length: int, *, last_only: bool = False) -> Counts:
    """What one sequence holds. Real tokens are those up to the last end of turn, padding and the line break behind it
    not counted; supervised ones are the assistant's with its end of turn (``last_only``: of its last message)."""
    supervised, newlines, real, whole = 0, 0, 0, 0
    for index, message in enumerate(messages):
        whole = _length(messages[: index + 1], tokenizer)
        real = min(whole, max_length)
        if message["role"] == "assistant" and (not last_only or index == len(messages) - 1):
            supervised += real - min(_length(messages[:index], tokenizer, reply=True), max_length)
            newlines += whole < max_length
    return Counts(real, supervised, newlines, int(whole > max_length), real * (real + 1) // 2)


def _length(messages: Messages, tokenizer: Any, *, reply: bool = False) -> int:
    """Tokens of ``messages``, up to the last end of turn or, with ``reply``, to where the assistant begins."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    return len(tokenizer(text if reply else text.rstrip("\n"), add_special_tokens=False).input_ids)


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model))


def write_jsonl(path: Path, values: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path
