"""Connections that wait for nobody for ever, and take no more than they can hold: uvicorn's own have no such limits."""

from asyncio import TimerHandle, Transport
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from swift.serve import limits
from swift.serve.errors import ApiError

PHRASES = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class Connection(HttpToolsProtocol):
    """Closed where a client does not go on: with the head of a request, the first one's from the beginning; with what is
    left of a body that was answered already; with taking its answer."""

    _timer: TimerHandle | None = None  # while the client is to send
    _write_timer: TimerHandle | None = None  # while it is to read
    _running: Any = None  # the request that is computed; uvicorn's ``cycle`` is the last one that came
    _is_lost = False
    _in_head = True
    _num_bytes = 0  # of a head that is not whole, or of something else that is neither head nor body

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._stop()
        self._stop_writing()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > limits.MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head of the request has more than {limits.MOST_HEAD_BYTES} bytes")
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._start()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what follows a body would be kept without being read
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop()
        self._in_head = False
        self._num_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_bytes = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._stop_writing()
        self._write_timer = self.loop.call_later(limits.WRITE_TIMEOUT_S, self._abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(limits.WRITE_TIMEOUT_S, self._abort)  # closing waits for what was not taken

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request."""
        content = msgspec.json.encode(ApiError(status, message).body())
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        transport: Any = self.transport
        transport.write(head % (status, PHRASES[status], len(content)) + content)
        transport.close()
        self.loop.call_later(limits.WRITE_TIMEOUT_S, self._abort)

    def _start(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(limits.HEAD_TIMEOUT_S, self._close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _close(self) -> None:
        if self.flow.read_paused:  # it waits for us
            self._start()
        else:
            self._abort()

    def _abort(self) -> None:
        transport: Any = self.transport
        if not self._is_lost:
            transport.abort()
