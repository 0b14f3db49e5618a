"""A load of chat requests on an OpenAI server: so many at once, each stream read to its end, times noted."""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WORDS = "snow wind ice road city river night morning school train storm cloud lamp water food heat call north south hill".split()
MOST_S = 900  # a load that takes longer is given up


class LoadError(Exception):
    """A request was not answered as it was asked."""


class NotReady(LoadError):
    """The server says that it cannot answer now."""


@dataclass(frozen=True)
class Answer:
    """Times in seconds: to the first piece of text, between pieces, to the end. Tokens as the server counts them."""

    first_s: float
    between_s: tuple[float, ...]
    whole_s: float
    tokens: int
    prompt_tokens: int
    text: str


def bodies(count: int, model: str, words: int, max_tokens: int, seed: int, extra: dict[str, Any]) -> list[bytes]:
    """Requests of random words, greedy; ``extra`` keeps an answer from ending before ``max_tokens``."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        text = " ".join(draw.choices(WORDS, k=words))
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}
        made.append(json.dumps({**body, "stream": True, **extra}).encode())
    return made


async def ask(host: str, port: int, body: bytes) -> Answer:
    """One request over a connection of its own, by hand: a client library would take the cores that are measured."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Host: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        problem = f"{status.decode().strip()}: {(await reader.read(2000)).decode(errors='replace')}"
        writer.close()
        raise NotReady(problem) if b" 50" in status else LoadError(problem)
    times: list[float] = []
    pieces: list[str] = []
    usage: dict[str, int] = {}
    while line := await reader.readline():
        at = line.find(b"data: {")
        if at < 0:
            continue
        event = json.loads(line[at + 6 :])
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            if text := (choice.get("delta") or {}).get("content"):
                times.append(time.perf_counter())
                pieces.append(text)
    writer.close()
    end = time.perf_counter()
    if not times or not usage:
        raise LoadError("an answer without text" if usage else "a server that does not count tokens")
    between = tuple(after - before for before, after in itertools.pairwise(times))
    return Answer(times[0] - begin, between, end - begin, usage["completion_tokens"], usage["prompt_tokens"], "".join(pieces))


async def _load(host: str, port: int, requests: Sequence[bytes], concurrency: int) -> tuple[list[Answer], float]:
    waiting = list(reversed(requests))
    answers: list[Answer] = []

    async def worker() -> None:
        while waiting:
            answers.append(await ask(host, port, waiting.pop()))

    begin = time.perf_counter()
    await asyncio.wait_for(asyncio.gather(*(worker() for _ in range(concurrency))), MOST_S)
    return answers, time.perf_counter() - begin


def load(host: str, port: int, requests: Sequence[bytes], concurrency: int, max_tokens: int) -> tuple[list[Answer], dict[str, float]]:
    """What a server made of ``requests``, ``concurrency`` of them at a time. LoadError if an answer has other than ``max_tokens``."""
    answers, seconds = asyncio.run(_load(host, port, requests, concurrency))
    if wrong := [answer.tokens for answer in answers if answer.tokens != max_tokens]:
        raise LoadError(f"{len(wrong)} of {len(answers)} answers have not {max_tokens} tokens, the first of them {wrong[0]}")
    firsts = sorted(answer.first_s for answer in answers)
    between = sorted(gap for answer in answers for gap in answer.between_s) or [0.0]
    return answers, {
        "tokens_per_s": sum(answer.tokens for answer in answers) / seconds,
        "first_p50_ms": 1e3 * statistics.median(firsts),
        "first_p95_ms": 1e3 * _quantile(firsts, 0.95),
        "between_p50_ms": 1e3 * statistics.median(between),
        "between_p95_ms": 1e3 * _quantile(between, 0.95),
        "requests": len(answers),
        "tokens": sum(answer.tokens for answer in answers),
        "pieces_per_token": sum(len(answer.between_s) + 1 for answer in answers) / sum(answer.tokens for answer in answers),
        "prompt_tokens": statistics.mean(answer.prompt_tokens for answer in answers),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]
