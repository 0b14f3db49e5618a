"""An engine over something that answers each request as a stream of its own, in other threads: SGLang, LMDeploy, a server."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from swift.engine.base import Delta, FinishReason, Request
from swift.engine.outside import Answer, Taker
from swift.errors import MachineError, SwiftError

WAIT_S = 0.02  # that a step waits for a first piece, so that requests and aborts are not held up
Put = Callable[[Delta | SwiftError], None]
# Begins an answer, whose deltas go to Put from any thread; what it returns gives the answer up.
Start = Callable[[Answer, Put], Callable[[], None]]
Piece = tuple[Sequence[int], FinishReason | None]


class StreamedEngine:
    """``start`` begins an answer. An error of a stream ends its own answer; the others go on."""

    def __init__(self, taker: Taker, max_model_len: int, start: Start, close: Callable[[], None]) -> None:
        self.max_model_len = max_model_len
        self._taker, self._start, self._close = taker, start, close
        self._arrived: queue.SimpleQueue[tuple[Answer, Delta | SwiftError]] = queue.SimpleQueue()
        self._answers: dict[str, tuple[Answer, Callable[[], None]]] = {}

    def add(self, request: Request) -> None:
        """See Engine."""
        answer = self._taker.answer(request, self._answers, self.max_model_len)
        self._answers[request.id] = answer, self._start(answer, lambda piece: self._arrived.put((answer, piece)))

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return not self._answers

    def step(self) -> list[Delta]:
        """See Engine."""
        deltas: list[Delta] = []
        while self._answers:
            try:
                answer, piece = self._arrived.get(timeout=0 if deltas else WAIT_S)
            except queue.Empty:
                break
            id = answer.request.id
            if self._answers.get(id, (None,))[0] is not answer:
                continue  # it was given up
            delta = Delta(id=id, finish_reason="abort", problem=piece) if isinstance(piece, SwiftError) else piece
            deltas.append(delta)
            if delta.finish_reason is not None:
                self.abort(id)
        return deltas

    def abort(self, id: str) -> None:
        """See Engine."""
        if (found := self._answers.pop(id, None)) is not None:
            found[1]()

    def close(self) -> None:
        """See Engine."""
        for id in list(self._answers):
            self.abort(id)
        self._close()


class Loop:
    """An event loop in a thread of its own. ``stream`` gives the tokens of an answer there."""

    def __init__(self, stream: Callable[[Answer], AsyncIterator[Piece]]) -> None:
        self._stream = stream
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def run(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives when it is called in the loop's thread."""

        async def call() -> Any:
            return make()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result()

    def start(self, answer: Answer, put: Put) -> Callable[[], None]:
        """See Start."""
        future = asyncio.run_coroutine_threadsafe(self._read(answer, put), self.loop)

        def give_up() -> None:
            future.cancel()

        return give_up

    def close(self) -> None:
        """End the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    async def _read(self, answer: Answer, put: Put) -> None:
        try:
            async for tokens, reason in self._stream(answer):
                if (delta := answer.add(tokens, ended=reason)) is not None:
                    put(delta)
                    if delta.finish_reason is not None:
                        return
            put(MachineError("the engine ended an answer without a reason"))
        except SwiftError as problem:
            put(problem)
        except Exception as problem:  # of another package: unseen, the answer would never end
            put(MachineError(f"the engine failed at an answer: {type(problem).__name__}: {problem}"))
