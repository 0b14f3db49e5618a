"""An engine that is killed, hangs or fails: its requests are told, others go on, and /health and /ready say how it is."""

import asyncio
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.serve.conftest import children_of
from tests.tiny import make_model

pytestmark = pytest.mark.slow  # it waits for engines that are started again, later each time
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Is it snowing?"}], "max_tokens": 4, "temperature": 0}
LONG = {**CHAT, "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(start, tiny_model):
    server = start(tiny_model, "--served_model_name", "tiny", "--engine_timeout_s", "3").wait()
    yield server
    server.end()


def asked(server, count=3, body=LONG):
    """Threads that wait for answers, and what they got so far."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(server.post("/v1/chat/completions", body))) for _ in range(count)]
    for thread in threads:
        thread.start()
    server.until(lambda: server.get("/health")[1]["requests"] == count)
    return threads, found


def test_a_hanging_engine_is_started_again_and_its_requests_get_503(server):
    threads, found = asked(server)
    os.kill(server.engine, signal.SIGSTOP)
    server.until(lambda: server.get("/health")[0] == 503)  # while it hangs, before it is given up
    assert server.get("/ready")[0] == 503
    for thread in threads:
        thread.join()
    assert [(status, body["error"]["code"]) for status, body in found] == [(503, "engine_unavailable")] * 3
    server.wait()
    assert server.get("/health")[1]["restarts"] == 1
    assert server.log.count("said nothing") == 1
    assert "the engine ended (it said nothing for 3 s); it is started again\n" in server.log
    assert server.post("/v1/chat/completions", CHAT)[0] == 200


def test_requests_to_a_hanging_engine_hold_up_no_other_route(server):
    """They are more than the pipe to the engine holds."""
    os.kill(server.engine, signal.SIGSTOP)
    body = {"model": "tiny", "prompt": [7] * 2000, "n": 100, "max_tokens": 2}
    found = []
    threads = [threading.Thread(target=lambda: found.append(server.post("/v1/completions", body)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.until(lambda: server.get("/health")[1]["requests"] == 300)
    assert server.get("/v1/models")[0] == 200
    for thread in threads:
        thread.join()
    assert found == [503] * 3
    server.wait()
    assert server.post("/v1/chat/completions", CHAT)[0] == 200


def test_requests_of_a_killed_engine_are_told_and_it_comes_back(server):
    restarts = server.get("/health")[1]["restarts"]
    threads, found = asked(server, count=2)
    streamed = []
    threads.append(threading.Thread(target=lambda: streamed.append(server.post("/v1/chat/completions", {**LONG, "stream": True}))))
    threads[-1].start()
    server.until(lambda: server.get("/health")[1]["requests"] == 3 and server.metric("swift_num_requests_running") == 3)
    os.kill(server.engine, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [503, 503]
    assert server.get("/health")[0] == 503 and server.get("/ready")[0] == 503
    assert server.metric("swift_num_requests_running") == 0
    (status, events) = streamed[0]
    if status == 200:  # its first piece had come
        assert "engine_unavailable" in events.strip().splitlines()[-1] and "[DONE]" not in events
    else:
        assert status == 503
    server.wait()
    assert server.get("/health")[1]["restarts"] == restarts + 1
    assert server.post("/v1/chat/completions", CHAT)[0] == 200


def test_an_engine_that_fails_is_started_again(server):
    """It gets no more memory, as under a limit of its container."""
    restarts = server.get("/health")[1]["restarts"]
    resource.prlimit(server.engine, resource.RLIMIT_AS, (1, 1))
    large = {"prompt": [[300, 310] * 950] * 256, "echo": True, "logprobs": 20}
    status, body = server.post("/v1/completions", {"model": "tiny", **large})
    assert (status, body["error"]["code"]) == (503, "engine_unavailable")
    server.wait()
    assert server.get("/health")[1]["restarts"] == restarts + 1
    assert server.post("/v1/chat/completions", CHAT)[0] == 200


def test_the_engine_ignores_the_signals_that_are_the_servers(server):
    """Service managers send them to all processes at once."""
    threads, found = asked(server, count=2)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(server.engine, number)
    assert server.get("/health")[1]["requests"] == 2
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200, 200]


def is_alive(pid):
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_engine_ends_with_its_server(server):
    engine = server.engine
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 20
    while is_alive(engine):
        assert time.monotonic() < end
        time.sleep(0.05)


def mapped(pid):
    """The files that a process has in its memory."""
    return Path(f"/proc/{pid}/maps").read_text()


def test_each_process_holds_what_it_needs_alone(start, tmp_path):
    """The one that speaks HTTP does without torch; the engine, of the file whose weights it has packed, needs rows of the embedding."""
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=1024)
    server = start(model, "--served_model_name", "tiny").wait()
    assert server.post("/v1/chat/completions", CHAT)[0] == 200
    assert "libtorch" not in mapped(server.process.pid)
    assert "PyTorch" not in server.log
    assert "libtorch" in mapped(server.engine)
    smaps = Path(f"/proc/{server.engine}/smaps").read_text()
    resident = sum(map(int, re.findall(rf"{re.escape(str(model))}/model.safetensors\n(?:.*\n)*?Rss: +(\d+) kB", smaps)))
    assert resident < 1000 < (model / "model.safetensors").stat().st_size / 8000
    server.end()


def test_a_server_that_is_ended_while_it_starts_leaves_no_engine(tiny_model):
    words = [sys.executable, "-m", "swift.cli", "deploy", "--model", str(tiny_model), "--port", "0"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not (engine := [pid for pid in children_of(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not is_alive(engine[0])


def test_what_another_server_refuses_or_loses_is_told_to_its_request_alone(start, tiny_model):
    server = start(tiny_model, "--served_model_name", "tiny").wait()
    options = ("--infer_backend", "remote", "--remote_url", f"{server.url}/v1", "--served_model_name", "tiny")
    before = start(tiny_model, *options).wait()
    refused = {**CHAT, "structured_outputs": {"regex": "("}}
    status, body = before.post("/v1/chat/completions", refused)
    assert (status, body["error"]["code"]) == (400, "unsupported_value")
    assert "cannot be read" in body["error"]["message"]
    threads, found = asked(before)
    server.until(lambda: server.get("/health")[1]["requests"] == 3)
    os.kill(server.engine, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert [(status, body["error"]["code"]) for status, body in found] == [(500, "engine_error")] * 3
    server.wait()
    assert before.post("/v1/chat/completions", CHAT)[0] == 200
    assert before.get("/health")[1]["restarts"] == 0
    before.end()
    server.end()


def test_an_engine_that_the_system_does_not_launch_is_tried_again(monkeypatch):
    """As when no memory is left for another process."""
    from swift.serve.runtime import Runtime, Unavailable

    async def scenario():
        runtime = Runtime(None, max_requests=1)
        monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", fail)
        await runtime.start()
        while runtime.num_restarts < 2:  # at once, and after a second
            await asyncio.sleep(0.05)
        with pytest.raises(Unavailable, match="it cannot be launched: Cannot allocate memory"):
            runtime.check_room(1)
        await runtime.stop()

    def fail(process):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    asyncio.run(asyncio.wait_for(scenario(), 20))
