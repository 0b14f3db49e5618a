"""The servers that `serve.py` compares, and what each is told so that all do the same.

Each gets the same number of threads, room for 64 requests at once, no cache of prompts, and weights of the same model.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer import PEERS

HOST = "127.0.0.1"
SLOTS = 64  # requests at once
CONTEXT = 256  # tokens of a request, prompt and answer, that llama.cpp sets memory aside for
LLAMA_CPP = PEERS / "llama-cpp" / "llama.cpp"
COUNTED = {"stream_options": {"include_usage": True}}
ENDLESS = {**COUNTED, "ignore_eos": True}


@dataclass(frozen=True)
class Job:
    """What is served where: a folder with safetensors."""

    model: Path
    port: int
    threads: int


@dataclass(frozen=True)
class Server:
    """A command, what stands in its environment besides, by which name it knows the model, and what
    a request says besides so that its answer has exactly so many tokens and they are counted."""

    command: Callable[[Job], list[str]]
    environment: Callable[[Job], dict[str, str]] = lambda _: {}
    served_name: Callable[[Path], str] = str
    extra: Callable[[int], dict[str, Any]] = lambda _: ENDLESS


def swift(*options: str, extra: Callable[[int], dict[str, Any]] = lambda _: ENDLESS) -> Server:
    return Server(
        lambda job: [
            *(sys.executable, "-m", "swift.cli", "deploy", "--model", str(job.model), "--port", str(job.port)),
            *("--served_model_name", "m", "--max_batch_size", str(SLOTS), *options),
        ],
        served_name=lambda _: "m",
        extra=extra,
    )


def transformers_serve(*options: str) -> Server:
    """`transformers serve` takes no `ignore_eos`: no token of the vocabulary is the end."""
    endless = {"eos_token_id": -1, "do_sample": False}
    return Server(
        lambda job: [
            *(_python("trl"), "-m", "transformers.cli.transformers", "serve", str(job.model), "--host", HOST, "--port", str(job.port)),
            *("--device", "cpu", "--dtype", "float32", *options),
        ],
        extra=lambda _: {"generation_config": json.dumps(endless)},
    )


def llama_cpp(kind: str) -> Server:
    """llama.cpp's own server; ``kind`` is the type of the weights."""
    threads = ("--threads", "--threads-batch")
    return Server(
        lambda job: [
            *(str(LLAMA_CPP / "llama-server"), "--model", str(gguf(job.model, kind)), "--host", HOST, "--port", str(job.port)),
            *(part for name in threads for part in (name, str(job.threads))),
            *("--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT), "--cont-batching"),
            *("--no-cache-prompt", "--cache-ram", "0", "--no-ui", "--offline"),
        ],
    )


def vllm(dtype: str) -> Server:
    """vLLM keeps a core for its front end unless it is told which cores to compute on, and advises Intel's OpenMP."""
    return Server(
        lambda job: [
            *(_python("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(job.model), "--host", HOST),
            *("--port", str(job.port), "--dtype", dtype, "--max-num-seqs", str(SLOTS), "--max-model-len", "2048"),
            *("--no-enable-prefix-caching", "--disable-log-stats"),
        ],
        environment=lambda job: {
            "LD_PRELOAD": str(PEERS / "vllm" / "lib" / "libiomp5.so"),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}" if job.threads > 1 else "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, as ours
            "VLLM_CACHE_ROOT": str(PEERS / "vllm" / "cache"),  # compiled once: a second start is faster than the first
            "VLLM_NO_USAGE_STATS": "1",
        },
    )


# 728 blocks of 32 tokens are 1 GiB of SmolLM2's keys and values; without a number it takes most of the machine's memory.
SERVERS = {
    **{
        f"swift {title}": swift("--torch_dtype", "float32", "--enable_prefix_caching", "false", "--weight_format", format)
        for title, format in (("fp32", "float32"), ("fp16", "float16"), ("int8", "int8"), ("int4", "int4"), ("torch", "torch"))
    },
    **{
        f"swift openvino {format}": swift(
            "--enable_prefix_caching", "false", "--infer_backend", "openvino", "--openvino_weight_format", format
        )
        for format in ("fp32", "fp16", "int8", "w8a8")
    },
    "swift generate": swift(
        "--torch_dtype", "float32", "--infer_backend", "transformers", extra=lambda tokens: {**COUNTED, "min_tokens": tokens}
    ),
    "llama.cpp f32": llama_cpp("f32"),
    "llama.cpp f16": llama_cpp("f16"),
    "llama.cpp q8_0": llama_cpp("q8_0"),
    "llama.cpp q4_0": llama_cpp("q4_0"),
    "vllm fp32": vllm("float32"),
    "vllm bf16": vllm("bfloat16"),
    "transformers serve": transformers_serve(),
    "transformers serve, continuous": transformers_serve("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "728"),
}


def gguf(model: Path, kind: str) -> Path:
    """``model`` as llama.cpp reads it, with weights of type ``kind``; made once, by llama.cpp's own tools."""
    folder = PEERS / "llama-cpp" / "gguf" / hashlib.sha256(str(model).encode()).hexdigest()[:12]
    place = folder / f"{kind}.gguf"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{kind}.part"
    if kind.startswith("q4"):
        command = [str(LLAMA_CPP / "llama-quantize"), str(gguf(model, "f32")), str(part), kind]
    else:
        command = [_python("llama-cpp"), str(LLAMA_CPP / "convert_hf_to_gguf.py"), str(model), "--outfile", str(part), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        sys.exit(f"{kind} was not made of {model}:\n{last}")
    part.rename(place)
    return place


def _python(environment: str) -> str:
    place = PEERS / environment / "bin" / "python"
    if not place.exists():
        sys.exit(f"{place} is not there; make it with bench/peers.sh {environment}, or choose others with --server")
    return str(place)
