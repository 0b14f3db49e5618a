"""Counts and times for /metrics, in Prometheus' text form: own names, and vLLM's for dashboards that know these."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from swift.engine.base import Delta

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """Values counted by upper bounds of ``SECONDS``."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(SECONDS, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


@dataclass
class Metrics:
    """What the server has seen since it started."""

    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # by finish reason
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and status

    def text(self, facts: Mapping[str, float], *, restarts: int, requests: int) -> str:
        """All of it. ``facts`` are the engine's."""
        return "\n".join(self._lines(facts, restarts, requests)) + "\n"

    def _lines(self, facts: Mapping[str, float], restarts: int, requests: int) -> Iterator[str]:
        for prefix in ("vllm:", "swift_"):
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                yield from _single(prefix + name, "gauge", facts.get(name, 0))
            for name in ("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"):
                yield from _single(prefix + name, "counter", facts.get(name, 0))
            yield from _single(f"{prefix}prompt_tokens_total", "counter", self.prompt_tokens)
            yield from _single(f"{prefix}generation_tokens_total", "counter", self.generated_tokens)
            yield f"# TYPE {prefix}request_success_total counter"
            for reason in ("stop", "length", "abort"):
                yield f'{prefix}request_success_total{{finished_reason="{reason}"}} {self.finished[reason]}'
            yield from self.first_token.lines(f"{prefix}time_to_first_token_seconds")
            yield from self.between_tokens.lines(f"{prefix}inter_token_latency_seconds")
            yield from self.whole.lines(f"{prefix}e2e_request_latency_seconds")
        yield from _single("swift_engine_restarts_total", "counter", restarts)
        yield from _single("swift_requests_in_flight", "gauge", requests)
        yield "# TYPE swift_http_responses_total counter"
        for (route, status), count in sorted(self.responses.items()):
            yield f'swift_http_responses_total{{route="{route}",status="{status}"}} {count}'


def _single(name: str, kind: str, value: float) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    yield f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


class Clock:
    """The times of one call's answers."""

    def __init__(self, metrics: Metrics, num_prompt: int) -> None:
        self._metrics = metrics
        self._begin = time.monotonic()
        self._last: dict[str, float] = {}
        metrics.prompt_tokens += num_prompt

    def note(self, delta: Delta) -> None:
        now, metrics = time.monotonic(), self._metrics
        metrics.generated_tokens += len(delta.token_ids)
        if delta.id not in self._last:
            metrics.first_token.add(now - self._begin)
        elif delta.token_ids:
            metrics.between_tokens.add((now - self._last[delta.id]) / len(delta.token_ids))
        self._last[delta.id] = now
        if delta.finish_reason is not None:
            metrics.finished[delta.finish_reason] += 1
            metrics.whole.add(now - self._begin)
