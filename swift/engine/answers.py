"""Answers of an engine to many requests, in the order of the requests; or to one, piece by piece."""

from collections.abc import Generator, Iterable, Iterator

from swift.engine.base import Completion, Delta, Engine, Logprob, Request

IN_FLIGHT = 256  # requests that an engine is given at once; it computes as many together as it can


class Gathered:
    """The deltas of one request so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[Logprob] = []
        self.completion: Completion | None = None

    def add(self, delta: Delta) -> None:
        if delta.problem is not None:
            raise delta.problem
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            ids = self.token_ids[:-1] if isinstance(delta.stopped_by, int) and delta.token_ids else self.token_ids
            self.completion = Completion("".join(self.texts), ids, delta.finish_reason, tuple(self.logprobs))


def answers(engine: Engine, requests: Iterable[Request]) -> Iterator[Completion]:
    """One completion for each request, in their order. What is not taken from the iterator is aborted when it is closed.

    Raises the problem of an answer that an engine could not compute.
    """
    source = iter(requests)
    order: list[str] = []
    gathered: dict[str, Gathered] = {}
    try:
        while True:
            while len(order) < IN_FLIGHT and (request := next(source, None)) is not None:
                engine.add(request)
                order.append(request.id)
                gathered[request.id] = Gathered()
            if not order:
                return
            for delta in engine.step():
                gathered[delta.id].add(delta)
            while order and (completion := gathered[order[0]].completion) is not None:
                del gathered[order.pop(0)]
                yield completion
    finally:
        for id in order:
            engine.abort(id)


def pieces(engine: Engine, request: Request) -> Generator[str, None, Completion]:
    """The text of the answer as it is written; returns the completion. Closing it stops the engine."""
    gathered = Gathered()
    engine.add(request)
    try:
        while gathered.completion is None:
            for delta in engine.step():
                if delta.id == request.id:
                    gathered.add(delta)
                    if delta.text:
                        yield delta.text
    finally:
        engine.abort(request.id)
    return gathered.completion
