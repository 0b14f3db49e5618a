"""A server of the tiny model, in processes of its own, as a user would start it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

# Of the tests with hostile clients
KEY, MARKER = "key-of-the-hostile-tests", "glacierword"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": f"Is it {MARKER}?"}], "max_tokens": 4, "temperature": 0}
LIMITS = {"HEAD_TIMEOUT_S": 1.5, "BODY_TIMEOUT_S": 1.5, "WRITE_TIMEOUT_S": 1.5, "GRAMMAR_TIMEOUT_S": 1.0}


class Server:
    """``swift deploy`` on a free port. ``log`` is what it said so far; ``limits`` replace those of swift.serve.limits."""

    def __init__(self, model, log, *options, limits=None):
        self.log_file = log
        program = f"from swift.cli import main; from swift.serve import limits; vars(limits).update({limits or {}}); main()"
        words = [sys.executable, "-c", program, "deploy", "--model", str(model), "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._stream = log.open("wb")
        self.process = subprocess.Popen(words, stdout=self._stream, stderr=subprocess.STDOUT, env=environment)
        self.key = options[options.index("--api_key") + 1] if "--api_key" in options else None
        self.url = self._found(r"(https?://\S+)/v1")

    @property
    def log(self):
        return self.log_file.read_text(errors="replace")

    def _found(self, pattern, timeout_s=60):
        return self.until(lambda: (found := re.search(pattern, self.log)) and found[1], timeout_s)

    def until(self, what, timeout_s=60):
        """What ``what`` gives once it is true."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended: {self.log}"
            if value := what():
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s: {self.log}")

    @property
    def engine(self):
        """The process id of the engine."""
        children = children_of(self.process.pid)
        (found,) = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return found

    def metric(self, name):
        """A number of /metrics."""
        lines = self.get("/metrics", self.key)[1].splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    def connect(self):
        """A connection, for what no client library sends."""
        host, port = self.url.rpartition("/")[2].split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    def raw(self, *pieces, method="POST"):
        """(status, body) of the first answer to ``pieces``, sent as they are; (None, b"") if the connection ends without one."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):  # it may answer and close before all is sent
                for piece in pieces:
                    connection.sendall(piece)
            return answer_of(connection, method)

    def get(self, path, key=None):
        """(status, body)"""
        return self.send("GET", path, None, key)

    def post(self, path, body, key=None):
        """(status, body) of JSON, or of bytes as they are."""
        return self.send("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), key)

    def send(self, method, path, data, key=None):
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, raw, self.headers = response.status, response.read(), response.headers
        except urllib.error.HTTPError as problem:
            status, raw, self.headers = problem.code, problem.read(), problem.headers
        with contextlib.suppress(ValueError):
            return status, json.loads(raw)
        return status, raw.decode()

    def wait(self):
        self.until(lambda: self.get("/ready")[0] == 200)
        return self

    def wait_until_idle(self):
        self.until(lambda: self.metric("swift_num_requests_running") == 0 and self.get("/health")[1]["requests"] == 0)
        return self

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._stream.close()


def children_of(pid):
    """The processes that a process has started."""
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def answer_of(connection, method="POST"):
    """(status, body) of the next answer on a connection; JSON is read."""
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        raw = response.read()
    except (http.client.HTTPException, OSError):
        return None, b""
    with contextlib.suppress(ValueError):
        return response.status, json.loads(raw)
    return response.status, raw


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start a server of a model with options; all are ended with the session."""
    servers = []

    def start(model, *options, limits=None):
        servers.append(Server(model, tmp_path_factory.mktemp("server") / "log.txt", *options, limits=limits))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)  # together: each takes seconds
    for server in servers:
        server.end()


@pytest.fixture(scope="session")
def server(start, tiny_model):
    """A server of the tiny model that is ready."""
    return start(tiny_model, "--served_model_name", "tiny", "alias").wait()


@pytest.fixture(scope="session")
def hostile(start, tiny_model):
    """A server that waits for seconds only, with a key and an access log."""
    return start(tiny_model, "--served_model_name", "tiny", "--api_key", KEY, "--access_log", "true", limits=LIMITS).wait()


@pytest.fixture
def target(hostile):
    """The server, beside which somebody asks again and again, is answered each time, and each time within seconds."""
    found, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            begin = time.monotonic()
            status, body = hostile.post("/v1/chat/completions", CHAT, KEY)
            found.append((status, len(body.get("choices", ())), time.monotonic() - begin))
            time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    yield hostile
    stop.set()
    thread.join()
    hostile.wait_until_idle()
    assert hostile.get("/health")[1]["restarts"] == 0
    assert found and {(status, choices) for status, choices, _ in found} == {(200, 1)}
    assert max(seconds for *_, seconds in found) < 5


def is_error(body, kind="invalid_request_error"):
    """Whether a body is OpenAI's error object."""
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["type"] == kind
