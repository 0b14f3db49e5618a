"""How long one waits: for help, and from launch to the first optimizer step.

    python bench/startup.py                  # a table
    python bench/startup.py --runs 9 --json  # one JSON line a peer and case

Cases: `swift`, `swift --help`, `swift sft --help`, each a whole process from launch to exit, and `swift sft` on a
tiny random Llama (2 layers, width 32) and 16 short rows, to the begin of its first optimizer step, as seen by the same
probe in every peer (probe/sitecustomize.py). The arithmetic of that training takes about 0.03 s, so it is all start-up.
Peers take turns (A B A B ...) after one run each that is not counted and warms the page cache.
CPU seconds count all processes and threads of the command; for training, those of the whole run to its exit.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer import BENCH, Run, apart, failure, machine, run, scratch_directory
from recipes import PEER_BY_NAME, ROWS_PER_STEP, Job
from rows import Row

SWIFTS = ("swift", "ms-swift")  # the two tools whose command is `swift`
HELP_CASES = {"swift": [], "swift --help": ["--help"], "swift sft --help": ["sft", "--help"]}
TRAIN_CASE = "swift sft, to the first optimizer step"


def make_tiny_model(path: Path) -> Path:
    """The random Llama of the tests, with its tokenizer, in ``path``."""
    sys.path.insert(0, str(BENCH.parent))
    from transformers.utils.logging import disable_progress_bar

    from tests.tiny import make_model

    disable_progress_bar()
    return make_model(path)


def tiny_rows() -> list[Row]:
    """One step's worth of rows of about twenty tokens."""
    return [
        Row([{"role": "user", "content": "What falls?"}, {"role": "assistant", "content": f"Snow, {depth} cm."}])
        for depth in range(ROWS_PER_STEP)
    ]


def measure_help(name: str, arguments: Sequence[str], threads: int) -> tuple[float, Run]:
    with scratch_directory() as directory:
        result = run([*PEER_BY_NAME[name].command, *arguments], threads=threads, scratch=Path(directory))
    return result.wall_s, result


def measure_training(name: str, model: Path, threads: int) -> tuple[float, Run]:
    with scratch_directory() as directory:
        scratch = Path(directory)
        command = PEER_BY_NAME[name].train_command(Job("lora", model, tiny_rows(), 512), scratch)
        result = run(command, threads=threads, scratch=scratch, probe=True)
    if result.exit_code != 0 or not result.probe.get("steps"):
        sys.exit(failure(name, result))
    return result.probe["steps"][0]["begin"]["at_s"], result


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def summary(name: str, case: str, measured: Sequence[tuple[float, Run]]) -> dict[str, Any]:
    runs = [result for _, result in measured]
    return {
        "peer": name,
        "case": case,
        "runs": len(runs),
        "seconds": spread([seconds for seconds, _ in measured]),
        "cpu_s": spread([result.cpu_s for result in runs]),
        "peak_rss_mb": max(result.peak_rss_mb for result in runs),
        "exit_codes": sorted({result.exit_code for result in runs}),
    }


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print("| case | peer | seconds: min / median / max | CPU s: min / median / max | peak RSS MB | exit code |")
    print("|---|---|---|---|---|---|")
    for result in results:
        seconds, cpu_s = (" / ".join(f"{value:.2f}" for value in result[key].values()) for key in ("seconds", "cpu_s"))
        codes = " ".join(map(str, result["exit_codes"]))
        print(f"| {result['case']} | {result['peer']} | {seconds} | {cpu_s} | {result['peak_rss_mb']:,.0f} | {codes} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line a peer and case instead of a table")
    parser.add_argument("--peer", nargs="+", default=SWIFTS, choices=SWIFTS, help="default: both")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each peer and case (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (default 1: the model is tiny)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for name in args.peer:
        assert PEER_BY_NAME[name].command  # a peer that is not installed is reported before anything runs
    if not args.json:
        print(f"{machine()}; {args.runs} runs of each", flush=True)
    measured: dict[tuple[str, str], list[tuple[float, Run]]] = defaultdict(list)
    with scratch_directory() as directory:
        model = apart(make_tiny_model, Path(directory) / "model")
        for number in range(args.runs + 1):
            for case in (*HELP_CASES, TRAIN_CASE):
                for name in args.peer:
                    if case == TRAIN_CASE:
                        one = measure_training(name, model, args.threads)
                    else:
                        one = measure_help(name, HELP_CASES[case], args.threads)
                    if number > 0:  # the first one warms the page cache
                        measured[case, name].append(one)
    results = [summary(name, case, runs) for (case, name), runs in measured.items()]
    if args.json:
        for result in results:
            print(json.dumps(result))
    else:
        print_table(results)


if __name__ == "__main__":
    main()
