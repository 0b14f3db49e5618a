"""The process in which the engine runs, and the messages between it and the server.

A process of its own, so that a crash of a kernel or an exhausted memory takes no connection with it, and so that
computing and HTTP do not wait for one another's interpreter lock.
"""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from swift.engine.base import Delta, Request
from swift.errors import ConfigError, DataError, SwiftError, first_line

TAKING_S = 0.05  # of new requests, before those under way get a step


@dataclass(frozen=True)
class Add:
    """To the worker: requests that share a prompt, added together."""

    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Abort:
    """To the worker."""

    ids: tuple[str, ...]


@dataclass(frozen=True)
class Embed:
    """To the worker: the embedding of each prompt is wanted."""

    id: str
    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Adapter:
    """To the worker: load the adapter in ``path`` under ``name``, or, without a path, take it away."""

    id: str
    name: str
    path: Path | None


@dataclass(frozen=True)
class Stop:
    """To the worker: end."""


@dataclass(frozen=True)
class Ready:
    """From the worker: the model is loaded."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Stepped:
    """From the worker: what a step brought, and how the engine stands."""

    deltas: tuple[Delta, ...]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """From the worker: the result of Embed or Adapter."""

    id: str
    value: Any


@dataclass(frozen=True)
class Refused:
    """From the worker: a request that the engine does not take or go on with. ``is_fault``: that is not the request's."""

    ids: tuple[str, ...]
    message: str
    is_fault: bool = False


@dataclass(frozen=True)
class Failed:
    """From the worker, the last thing it says: why it ends."""

    message: str


def work(connection: Connection, config: Any, adapters: Mapping[str, Path]) -> None:
    """The whole life of the process. ``adapters``: loaded from the start, by name."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes at once; the server decides when to end
        signal.signal(number, signal.SIG_IGN)
    try:
        engine, facts = _load(config)
        for name, path in adapters.items():
            _change(engine, Adapter("", name, path))
    except SwiftError as problem:
        connection.send(Failed(_line(problem)))
        return
    except Exception as problem:
        connection.send(Failed(f"{type(problem).__name__}: {first_line(problem)}"))
        raise
    try:
        connection.send(Ready(facts))
        _serve(connection, engine)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server is gone
    except Exception as problem:
        connection.send(Failed(type(problem).__name__))
        raise
    finally:
        engine.close()


def _load(config: Any) -> tuple[Any, dict[str, Any]]:
    from swift import console
    from swift.engine.load import make_engine, source_of

    console.quiet_libraries()
    source = source_of(config, merge=config.merge_lora)
    engine = make_engine(source)
    facts = {
        "engine": type(engine).__module__.split(".")[2],
        "max_model_len": getattr(engine, "max_model_len", None),
        **source.facts(),
    }
    return engine, facts


def _serve(connection: Connection, engine: Any) -> None:
    while True:
        begin = time.monotonic()
        while (engine.is_idle or time.monotonic() - begin < TAKING_S) and connection.poll(None if engine.is_idle else 0):
            message = connection.recv()
            if isinstance(message, Stop):
                return
            _take(connection, engine, message)
        if not engine.is_idle:
            deltas = engine.step()
            for delta in deltas:
                if delta.problem is not None:
                    connection.send(_refused((delta.id,), delta.problem, is_fault=not isinstance(delta.problem, DataError)))
            connection.send(Stepped(tuple(delta for delta in deltas if delta.problem is None), _facts(engine)))


def _take(connection: Connection, engine: Any, message: Any) -> None:
    try:
        if isinstance(message, Add):
            _add(engine, message.requests)
        elif isinstance(message, Abort):
            for id in message.ids:
                engine.abort(id)
            connection.send(Stepped((), _facts(engine)))
        elif isinstance(message, Embed):
            if not hasattr(engine, "embed"):
                raise ConfigError("this engine gives no embeddings", hint="--infer_backend native")
            connection.send(Answered(message.id, engine.embed(message.prompts)))
        elif isinstance(message, Adapter):
            _change(engine, message)
            connection.send(Answered(message.id, None))
    except SwiftError as problem:
        connection.send(_refused(_ids(message), problem))
    except Exception as problem:
        traceback.print_exc()
        connection.send(Refused(_ids(message), f"the engine failed at the request: {type(problem).__name__}", is_fault=True))


def _refused(ids: tuple[str, ...], problem: SwiftError, *, is_fault: bool = False) -> Refused:
    return Refused(ids, _line(problem), is_fault)


def _line(problem: SwiftError) -> str:
    return f"{problem}" + (f" ({problem.hint})" if problem.hint else "")


def _change(engine: Any, message: Adapter) -> None:
    if not hasattr(engine, "load_adapter"):
        raise ConfigError("this engine serves no adapters beside the model", hint="--infer_backend native, or merge the adapter")
    if message.path is None:
        engine.unload_adapter(message.name)
    else:
        engine.load_adapter(message.name, message.path)


def _ids(message: Any) -> tuple[str, ...]:
    return tuple(request.id for request in message.requests) if isinstance(message, Add) else (message.id,)


def _add(engine: Any, requests: Sequence[Request]) -> None:
    """All of them or none."""
    added = []
    try:
        for request in requests:
            engine.add(request)
            added.append(request.id)
    except BaseException:
        for id in added:
            engine.abort(id)
        raise


def _facts(engine: Any) -> dict[str, float]:
    return dict(engine.facts()) if hasattr(engine, "facts") else {}
