"""What stands before every route: keys, sizes, times, and the access log."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from swift.serve import limits
from swift.serve.errors import ApiError
from swift.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/health", "/ready")  # a load balancer has no key
log = logging.getLogger("swift.access")


class Guard:
    """An ASGI application before another.

    ``keys``: one of them is wanted on every route but ``OPEN``; none are wanted if there are none. ``max_body`` bytes may
    one body have, and ``MOST_HELD`` times as many those of all requests under way.
    """

    def __init__(self, app: Any, *, keys: tuple[str, ...], max_body: int, metrics: Metrics, paths: Sequence[str]) -> None:
        self.app = app
        self.keys = tuple(key.encode() for key in keys)
        self.max_body = max_body
        self.num_held = 0  # bytes
        self.metrics = metrics
        self.paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 499  # as nginx says where the client left

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self.num_held + size > limits.MOST_HELD * self.max_body:
                problem = "the requests under way hold too much memory; come again in 5 s"
                raise _closing(ApiError(503, problem, code="overloaded", headers={"Retry-After": "5"}))
            held += size
            self.num_held += size

        try:
            body = await self._body(scope, receive, self._fault(scope), hold)
            await self.app(scope, _after(body, receive), noted)
        except ApiError as problem:
            await problem.response()(scope, receive, noted)
        finally:
            self.num_held -= held
            route = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.responses[(route, status)] += 1
            client = scope.get("client") or ("", 0)
            facts = {"client": client[0], "method": scope["method"], "path": scope["path"], "status": status}
            log.info(json.dumps({**facts, "seconds": round(time.monotonic() - begin, 4)}))

    def _fault(self, scope: Scope) -> ApiError | None:
        """Why the request is refused whatever its body says: its body is read all the same, but not kept."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > limits.MOST_HEAD_BYTES:
            return ApiError(431, f"the head of the request has more than {limits.MOST_HEAD_BYTES} bytes", headers={"Connection": "close"})
        if not self.keys or scope["path"] in OPEN:
            return None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "the API key is wrong" if key else "an API key is needed: Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None

    async def _body(self, scope: Scope, receive: Receive, fault: ApiError | None, hold: Callable[[int], None]) -> bytes:
        """The whole body, each part of which is announced to ``hold``. Raises ``fault`` if there is one, or what is wrong with the body."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        most = int(length) if length.isdigit() else 0
        if most > self.max_body:
            fault = fault or self._too_large()
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        if fault is not None and (waits or most > limits.READ_AND_FORGOTTEN * self.max_body):
            raise _closing(fault)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > self.max_body:
                        fault = fault or self._too_large()
                    if fault is None:
                        hold(len(part))
                        parts.append(part)
                    elif size > limits.READ_AND_FORGOTTEN * self.max_body:
                        raise _closing(fault)
                    else:
                        parts.clear()
                    if not message.get("more_body"):
                        break
            if fault is not None:
                raise fault
            return b"".join(parts)
        except TimeoutError:
            raise _closing(fault or ApiError(408, f"the body did not arrive within {limits.BODY_TIMEOUT_S:g} s")) from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.max_body} bytes", code="body_too_large", headers={"Connection": "close"})


def _closing(problem: ApiError) -> ApiError:
    """The connection cannot be used again: what is left of the body would be read as the next request."""
    problem.headers = {**(problem.headers or {}), "Connection": "close"}
    return problem


def _after(body: bytes, receive: Receive) -> Receive:
    """``receive`` whose first message is the whole body."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return next_message
