"""Connections that mean harm, or know no better. Beside each, one that behaves gets its answers."""

import contextlib
import json
import socket
import time

import pytest

from tests.serve.conftest import CHAT, KEY, answer_of, is_error

LONG = {**CHAT, "max_tokens": 2000, "ignore_eos": True}
AUTHORIZED = f"Authorization: Bearer {KEY}\r\n"


def head(method="POST", path="/v1/chat/completions", length=None, extra="", version="1.1", kind="application/json"):
    sized = "" if length is None else f"Content-Length: {length}\r\n"
    return f"{method} {path} HTTP/{version}\r\nHost: x\r\n{AUTHORIZED}Content-Type: {kind}\r\n{sized}{extra}\r\n".encode()


def body_of(file):
    """The body of the next of several answers."""
    assert file.readline() == b"HTTP/1.1 200 OK\r\n"
    length = 0
    while (line := file.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return file.read(length)


def request(body, **options):
    content = json.dumps(body).encode()
    return head(length=len(content), **options) + content


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300,  # TLS
        b"GET / HTTP/1.1\r\nHost: x\r\nBad header\r\n\r\n",
        b"SNOW / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        head(length="-1"),
        head(length="many"),
        head(length=3, extra="Content-Length: 5\r\n") + b"{} {}",
        head(length=3, extra="Transfer-Encoding: chunked\r\n") + b"2\r\n{}\r\n0\r\n\r\n",
        head(extra="Transfer-Encoding: chunked\r\n") + b"zz\r\n",
    ],
    ids=["tls", "header", "method", "target", "negative", "text", "two lengths", "length and chunks", "chunk"],
)
def test_what_is_no_http_gets_an_error_object(target, data):
    status, body = target.raw(data)
    assert status == 400 and is_error(body)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 40_000 + b"\r\n"],
        [b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\nX: "] + [b"a" * 60_000] * 50,  # never ends
    ],
    ids=["one", "many", "target", "endless"],
)
def test_a_huge_head_is_refused(target, pieces):
    status, body = target.raw(*pieces)
    assert (status is None and len(pieces) > 1) or (status == 431 and is_error(body))  # reset while it was still being sent


def test_a_slow_head_ends_the_connection(target):
    with target.connect() as connection:
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            for letter in "GET /health HTTP/1.1\r\nX: " + "a" * 100:
                connection.sendall(letter.encode())
                time.sleep(0.1)
        assert time.monotonic() - begin < 8
        with contextlib.suppress(OSError):
            assert connection.recv(1000) == b""


def test_silent_and_half_open_connections_are_closed(target):
    connections = [target.connect() for _ in range(50)]
    for connection in connections[:25]:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    for connection in connections:
        assert connection.recv(1000) == b""
        connection.close()


def test_a_slow_body_gets_408(target):
    status, body = target.raw(head(length=100), b"{")
    assert status == 408 and is_error(body)


def test_a_body_after_its_answer_does_not_keep_the_connection(target):
    """Without a key all is refused at once: who goes on sending is not waited for."""
    with target.connect() as connection:
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - begin < 8


@pytest.mark.parametrize(("length", "expected"), [(10 * 2**20, 413), (10**10, 413), (10**30, 400)])
def test_a_body_announced_too_large_is_refused(target, length, expected):
    status, body = target.raw(head(length=length), b"x" * 10 * 2**20)
    assert (status == expected and is_error(body)) or (status is None and length > 10**9)  # reset while it was still being sent
    status, body = target.raw(head(length=length, extra="Expect: 100-continue\r\n"))
    assert status == expected and is_error(body)


def test_a_chunked_body_over_the_limit_is_refused(target):
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    status, body = target.raw(head(extra="Transfer-Encoding: chunked\r\n"), *[chunk] * 10, b"0\r\n\r\n")
    assert status == 413 and body["error"]["code"] == "body_too_large"


def test_endless_chunks_and_trailers_end_the_connection(target):
    begin = time.monotonic()
    for piece, count in ((b"100000\r\n" + b" " * 2**20 + b"\r\n", 200), (b"", 0)):
        with target.connect() as connection, contextlib.suppress(OSError):
            connection.sendall(head(extra="Transfer-Encoding: chunked\r\n"))
            for _ in range(count):
                connection.sendall(piece)
            connection.sendall(b"0\r\n")
            for _ in range(2000):
                connection.sendall(b"X: " + b"a" * 2**16 + b"\r\n")
    assert time.monotonic() - begin < 20


def test_a_length_that_lies_harms_only_its_sender(target):
    content = json.dumps(CHAT).encode()
    status, body = target.raw(head(length=len(content) - 5) + content)
    assert status == 400 and is_error(body)
    status, body = target.raw(head(length=len(content) + 5) + content)
    assert status == 408 and is_error(body)


def test_pipelined_requests_are_answered_in_order(target):
    with target.connect() as connection:
        connection.sendall(b"".join(request({**CHAT, "max_tokens": count}) for count in (1, 2, 3)))
        with connection.makefile("rb") as file:
            found = [json.loads(body_of(file)) for _ in range(3)]
    assert [one["usage"]["completion_tokens"] for one in found] == [1, 2, 3]


def test_a_client_that_pipelines_and_leaves_stops_its_answer(target):
    with target.connect() as connection:
        connection.sendall(request({**LONG, "stream": True}) + request(LONG))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    target.wait_until_idle()


def test_older_http_is_answered_and_closed(target):
    with target.connect() as connection:
        connection.sendall(request(CHAT, version="1.0"))
        assert answer_of(connection)[0] == 200
        assert connection.recv(10) == b""


def test_other_methods_get_their_status(target):
    assert target.raw(head("HEAD", "/health"), method="HEAD")[0] == 200
    for method in ("HEAD", "OPTIONS", "GET", "PUT", "PATCH", "DELETE", "TRACE"):
        status, body = target.raw(head(method, "/v1/completions"), method=method)
        assert status == 405 and (method == "HEAD" or is_error(body))
    for path in ("/", "/v1", "/v1/chat/completions/", "/%00", "/%ff", "//v1/models", "/../etc/passwd", "/v1/models/..%2f..", "/metrics/"):
        status, body = target.raw(head("GET", path))
        assert status == 404 and is_error(body, "not_found_error"), path


def test_upgrades_are_not_taken(target):
    upgrade = "Connection: Upgrade\r\nUpgrade: {}\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    for name in ("websocket", "h2c"):
        assert target.raw(head("GET", "/v1/models", extra=upgrade.format(name)))[0] in (200, 400)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp"]
)
def test_a_body_that_a_page_makes_a_browser_send_is_refused(target, kind):
    """It comes without a question before, and names the page; the same from a program, such as curl, is read."""
    status, body = target.raw(request(CHAT, kind=kind, extra="Origin: http://elsewhere.example\r\n"))
    assert status == 415 and is_error(body)
    assert target.raw(request(CHAT, kind=kind))[0] == 200


def test_a_client_that_never_reads_is_dropped(target):
    """Log-probabilities make the answer larger than what sockets hold."""
    body = {**LONG, "n": 64, "stream": True, "logprobs": True, "top_logprobs": 20}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = target.url.rpartition("/")[2].split(":")
        connection.connect((host, int(port)))
        connection.sendall(request(body))
        target.until(lambda: target.get("/health")[1]["requests"] >= 64)
        target.until(lambda: target.metric("swift_num_requests_running") <= 1)
        assert target.metric("swift_generation_tokens_total") < 64 * 2000


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(target, stream):
    with target.connect() as connection:
        connection.sendall(request({**LONG, "stream": stream, "n": 8}))
        target.until(lambda: target.get("/health")[1]["requests"] >= 8)
    target.until(lambda: target.get("/health")[1]["requests"] <= 1)
    target.until(lambda: target.metric("swift_num_requests_running") <= 1)
