"""The engine as the server sees it: requests in, deltas out, whatever becomes of the process that computes them."""

import asyncio
import multiprocessing
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swift import console
from swift.engine.base import Delta, Request
from swift.serve import limits, worker

State = Literal["starting", "ready", "restarting", "stopped"]
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)  # before a worker is started again, longer while it fails at once


class Unavailable(Exception):
    """The engine is not there: it is starting, or was lost with the request."""


class Overloaded(Exception):
    """More requests wait than may. ``retry_after_s`` is when to come again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotTaken(Exception):
    """The engine does not take the request, for a reason of the request's."""


class Faulty(Exception):
    """The engine does not take or go on with the request, for a reason of the engine's."""


class TimedOut(Exception):
    """The answer took longer than it may."""


REASONS = (Overloaded, Unavailable, NotTaken, Faulty, TimedOut)


@dataclass(eq=False)
class _Call:
    """A caller that waits for the deltas of ``ids``, or for one answer."""

    ids: tuple[str, ...]
    queue: "asyncio.Queue[Delta | BaseException | Any]" = field(default_factory=asyncio.Queue)

    @property
    def is_behind(self) -> bool:
        """Whether more waits than is kept for a caller that does not take it."""
        return self.queue.qsize() > limits.MOST_BEHIND * len(self.ids)


class Runtime:
    """Owns the worker process. All methods run in the event loop but ``_read`` and ``_write``, so that it waits for no pipe."""

    def __init__(self, config: Any, *, adapters: Mapping[str, Path] | None = None, max_requests: int, hang_s: float = 120.0) -> None:
        self.config = config
        self.max_requests = max_requests
        self.hang_s = hang_s
        self.state: State = "starting"
        self.facts: dict[str, Any] = {}
        self.engine_facts: dict[str, float] = {}
        self.adapters = dict(adapters or {})  # by name; an engine that is started again has them too
        self.num_restarts = 0
        self.failure: str | None = None
        self._calls: dict[str, _Call] = {}
        self._process: Any = None
        self._pipe: Any = None  # to a worker that was launched, and that nobody listens to yet
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._heard_at = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._finish_rate = 1.0  # requests a second, lately
        self._finished_at = time.monotonic()

    async def start(self) -> None:
        """Start the worker; returns at once. ``ready`` waits."""
        self._loop = asyncio.get_running_loop()
        self._watch = asyncio.create_task(self._supervise())

    async def ready(self, timeout_s: float | None = None) -> bool:
        """Whether the model is loaded, waiting for it so long."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        return self.state == "ready"

    @property
    def is_healthy(self) -> bool:
        """Whether the engine is there and, while requests are under way, lets hear of itself."""
        return self.state == "ready" and not (self._calls and time.monotonic() - self._heard_at > self.hang_s / 2)

    @property
    def num_requests(self) -> int:
        return len(self._calls)

    def check_room(self, count: int) -> None:
        """Raises Unavailable or Overloaded if ``count`` more requests are not taken now, NotTaken if they never are."""
        if self.state != "ready":
            raise Unavailable(f"the engine is {self.state}" + (f": {self.failure}" if self.failure else ""))
        if count > self.max_requests:
            raise NotTaken(f"{count} answers are wanted at once, {self.max_requests} are possible")
        if len(self._calls) + count > self.max_requests:
            wait = max(1, min(60, round(len(self._calls) / max(self._finish_rate, 1 / 60))))
            raise Overloaded(f"{len(self._calls)} requests are under way or waiting, {self.max_requests} at most", wait)

    async def generate(self, requests: Sequence[Request], timeout_s: float) -> AsyncGenerator[Delta]:
        """The deltas of all ``requests`` as they come, until each is finished. What is not finished when this is closed is aborted.

        Raises one of ``REASONS``, and Unavailable too if the caller takes the deltas more slowly than they come.
        """
        self.check_room(len(requests))
        assert self._loop is not None
        if not self._calls:
            self._heard_at = time.monotonic()
        call = _Call(tuple(request.id for request in requests))
        missing = set(call.ids)
        for id in call.ids:
            self._calls[id] = call
        too_late = TimedOut(f"the answer took longer than {timeout_s:g} s")
        timer = self._loop.call_later(timeout_s, call.queue.put_nowait, too_late)
        try:
            self._send(worker.Add(tuple(requests)))
            while missing:
                got = await call.queue.get()
                if isinstance(got, BaseException):
                    raise got
                if got.finish_reason is not None:
                    missing.discard(got.id)
                    self._calls.pop(got.id, None)
                    self._note_finish()
                yield got
        finally:
            timer.cancel()
            for id in call.ids:
                self._calls.pop(id, None)
            if missing and self.state == "ready":
                self._send(worker.Abort(tuple(missing)))

    async def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector for each prompt. Others' answers go on between a few of them and the next."""
        vectors: list[list[float]] = []
        some: list[tuple[int, ...]] = []
        for number, prompt in enumerate(prompts, 1):
            some.append(tuple(prompt))
            if number == len(prompts) or sum(map(len, some)) + len(prompts[number]) > limits.MOST_EMBEDDED_TOKENS:
                vectors += await self._ask(lambda id, some=tuple(some): worker.Embed(id, some))
                some.clear()
        return vectors

    async def load_adapter(self, name: str, path: Path) -> None:
        """Load the adapter in ``path`` for requests that ask for ``name``."""
        await self._ask(lambda id: worker.Adapter(id, name, path))
        self.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        await self._ask(lambda id: worker.Adapter(id, name, None))
        self.adapters.pop(name, None)

    async def stop(self) -> None:
        """End the worker. Requests under way are lost: wait for them before."""
        self.state = "stopped"
        if self._watch is not None:
            self._watch.cancel()
        self._fail_all(Unavailable("the server is stopping"))
        self._send(worker.Stop())
        if self._process is not None:
            await asyncio.to_thread(self._process.join, 5)
            self.kill()

    def kill(self) -> None:
        """End the worker at once, if it is there."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join(5)

    async def _ask(self, make: Any) -> Any:
        self.check_room(1)
        if not self._calls:
            self._heard_at = time.monotonic()
        id = uuid.uuid4().hex
        call = _Call((id,))
        self._calls[id] = call
        try:
            self._send(make(id))
            got = await call.queue.get()
            if isinstance(got, BaseException):
                raise got
            return got
        finally:
            self._calls.pop(id, None)

    def _note_finish(self) -> None:
        now = time.monotonic()
        rate = 1 / max(now - self._finished_at, 1e-3)
        self._finish_rate += 0.1 * (rate - self._finish_rate)
        self._finished_at = now

    def _send(self, message: Any) -> None:
        self._outbox.put(message)

    async def _supervise(self) -> None:
        """Start the worker, and again whenever it ends or says nothing while it should."""
        failures = 0
        while self.state != "stopped":
            begin = time.monotonic()
            try:
                if self._pipe is None:
                    self.launch()
            except OSError as problem:  # no memory or no processes are left for it
                self.failure = f"it cannot be launched: {problem.strerror or problem}"
            else:
                await self._attended()
            lived = time.monotonic() - begin
            was_ready = self._ready.is_set()
            self._ready.clear()
            self.state = "restarting"
            self.engine_facts = {}
            self._fail_all(Unavailable("the engine was lost" + (f": {self.failure}" if self.failure else "")))
            failures = 0 if was_ready and lived > 60 else failures + 1
            self.num_restarts += 1
            wait = BACKOFF_S[min(failures, len(BACKOFF_S)) - 1] if failures else 0.0
            console.warn(
                f"the engine ended ({self.failure or 'no reason given'}); it is started again" + (f" in {wait:g} s" if wait else "")
            )
            await asyncio.sleep(wait)

    def launch(self) -> None:
        """Start the worker; what it says is heard from ``start`` on, which does this too if it was not done before."""
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=worker.work, args=(theirs, self.config, dict(self.adapters)), name="swift-engine", daemon=True)
        with theirs:
            try:
                process.start()
            except OSError:
                mine.close()
                raise
        self._pipe, self._process = mine, process

    async def _attended(self) -> None:
        """Talk with the worker that was launched, until it ends or is given up."""
        mine, self._pipe = self._pipe, None
        self._gone.clear()
        self.failure = None
        self._outbox = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(mine, self._outbox), name="engine-writer", daemon=True).start()
        threading.Thread(target=self._read, args=(mine, self._process, self._outbox), name="engine-reader", daemon=True).start()
        while not self._gone.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._gone.wait(), 1.0)
            if self.state == "ready" and self._calls and time.monotonic() - self._heard_at > self.hang_s:
                self.failure = f"it said nothing for {self.hang_s:g} s"
                self._process.kill()
                await self._gone.wait()

    def _write(self, connection: Any, outbox: "queue.SimpleQueue[Any]") -> None:
        """A thread: hands on what is said to the worker, which may be computing, or hang."""
        with suppress(OSError):
            while (message := outbox.get()) is not None:
                connection.send(message)
        connection.close()

    def _read(self, connection: Any, process: Any, outbox: "queue.SimpleQueue[Any]") -> None:
        """A thread: hands on what the worker says until it ends."""
        assert self._loop is not None
        try:
            while True:
                message = connection.recv()
                self._loop.call_soon_threadsafe(self._take, message)
        except (EOFError, OSError):
            pass
        finally:
            process.kill()  # it may have closed the pipe and still be there
            process.join()
            outbox.put(None)
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._lost, process.exitcode)

    def _take(self, message: Any) -> None:
        self._heard_at = time.monotonic()
        if isinstance(message, worker.Stepped):
            self.engine_facts = message.facts
            for delta in message.deltas:
                if (call := self._calls.get(delta.id)) is not None and not call.is_behind:
                    call.queue.put_nowait(delta)
                    if call.is_behind:
                        self._drop(call)
        elif isinstance(message, worker.Ready):
            self.facts, self.state = message.facts, "ready"
            self._ready.set()
        elif isinstance(message, worker.Refused):
            for call in {self._calls[id] for id in message.ids if id in self._calls}:
                call.queue.put_nowait((Faulty if message.is_fault else NotTaken)(message.message))
        elif isinstance(message, worker.Answered):
            if message.id in self._calls:
                self._calls[message.id].queue.put_nowait(message.value)
        elif isinstance(message, worker.Failed):
            self.failure = message.message

    def _drop(self, call: _Call) -> None:
        """Give up a call whose caller does not take what comes."""
        for id in call.ids:
            self._calls.pop(id, None)
        self._send(worker.Abort(call.ids))
        while not call.queue.empty():
            call.queue.get_nowait()
        call.queue.put_nowait(Unavailable("the answer was read more slowly than it was written"))

    def _lost(self, exit_code: int | None) -> None:
        if self.failure is None and exit_code:
            self.failure = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        self._gone.set()

    def _fail_all(self, problem: BaseException) -> None:
        for call in set(self._calls.values()):
            call.queue.put_nowait(problem)
        self._calls.clear()
