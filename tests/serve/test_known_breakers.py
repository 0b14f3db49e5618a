"""Requests that break other servers of language models: each is answered as OpenAI's documentation says, or refused by name."""

import json
import socket
import subprocess
import sys
import time

import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Is it snowing?"}], "max_tokens": 8, "temperature": 0}
RAW = {"model": "tiny", "prompt": "Snow", "max_tokens": 8, "temperature": 0}
EVER = {"ignore_eos": True}


def text(answer):
    (choice,) = answer[1]["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path, body", [("/v1/chat/completions", CHAT), ("/v1/completions", RAW)])
def test_a_stream_with_beams_is_refused_and_those_after_it_are_answered(server, path, body):
    for _ in range(3):
        status, found = server.post(path, {**body, "stream": True, "num_beams": 2})
        assert status == 400 and found["error"]["param"] == "num_beams"
    assert server.post(path, body)[0] == 200
    assert server.get("/health")[1]["restarts"] == 0


def test_a_json_object_is_an_object(server):
    answer = server.post(
        "/v1/chat/completions", {**CHAT, "max_tokens": 400, "temperature": 1, "seed": 3, "response_format": {"type": "json_object"}}
    )
    (choice,) = answer[1]["choices"]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


def test_max_completion_tokens_counts(server):
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    status, found = server.post("/v1/chat/completions", {**body, **EVER, "max_completion_tokens": 3})
    assert status == 200 and found["usage"]["completion_tokens"] == 3
    assert found["choices"][0]["finish_reason"] == "length"
    status, found = server.post("/v1/chat/completions", {**body, **EVER, "max_completion_tokens": 3, "max_tokens": 9})
    assert found["usage"]["completion_tokens"] == 3


def test_a_seed_gives_the_same_answer_and_another_one_another(server):
    def ask(seed):
        return text(server.post("/v1/chat/completions", {**CHAT, **EVER, "temperature": 2, "seed": seed}))

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_stop_may_be_a_text_or_a_list(server):
    whole = text(server.post("/v1/completions", {**RAW, **EVER}))
    word = whole[2:4]
    for stop in (word, [word], ["no such word", word]):
        status, found = server.post("/v1/completions", {**RAW, **EVER, "stop": stop})
        assert status == 200 and found["choices"][0]["text"] == whole[: whole.index(word)]
        assert found["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("prompt", ["Snow", ["Snow"], ["Snow", "Rain"], [5, 6], [[5, 6]], [[5, 6], [7]]])
def test_a_prompt_may_have_each_of_its_forms(server, prompt):
    status, found = server.post("/v1/completions", {**RAW, "prompt": prompt})
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert status == 200 and len(found["choices"]) == (len(prompt) if several else 1)


def test_a_raw_prompt_is_not_put_into_the_chat_template(server):
    status, found = server.post("/v1/completions", {**RAW, "echo": True, "max_tokens": 0, "logprobs": 0})
    assert status == 200 and found["choices"][0]["text"] == "Snow"
    assert "".join(found["choices"][0]["logprobs"]["tokens"]) == "Snow"


def test_settings_of_requests_beside_one_another_do_not_meet(server):
    """Each of these differs in what is computed together elsewhere, or not at all."""
    settings = [
        {"seed": 1, "temperature": 2},
        {"temperature": 0},
        {"max_tokens": 3},
        {"top_k": 1, "temperature": 1},
        {"frequency_penalty": 2},
    ]
    alone = [text(server.post("/v1/completions", {**RAW, **EVER, **setting})) for setting in settings]
    program = (
        "import json, sys, urllib.request\n"
        "request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {'Content-Type': 'application/json'})\n"
        "print(json.load(urllib.request.urlopen(request))['choices'][0]['text'], end='')"
    )
    url = f"{server.url}/v1/completions"
    commands = [[sys.executable, "-c", program, url, json.dumps({**RAW, **EVER, **setting})] for setting in settings]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    assert [process.communicate(timeout=60)[0].decode() for process in processes] == alone


def test_an_unknown_field_is_named_and_not_ignored(server):
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", RAW)):
        status, found = server.post(path, {**body, "max_new_tokens": 5})
        assert status == 400 and found["error"]["param"] == "max_new_tokens"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/v1/nothing"])
def test_reading_needs_a_key_too(guarded, path):
    for key in (None, "wrong", ""):
        status, found = guarded.get(path, key)
        assert status == 401 and found["error"]["code"] == "invalid_api_key"
    assert guarded.get(path, "right")[0] in (200, 404)


@pytest.mark.parametrize("given", ["right", "Basic right", "bearer", "Bearer", "Bearer right x", "Bearer \xff", "Bearer right,wrong"])
def test_a_key_in_another_form_is_a_wrong_one(guarded, given):
    data = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {given}\r\n\r\n".encode("latin-1")
    assert guarded.raw(data)[0] == 401


@pytest.fixture(scope="module")
def guarded(start, tiny_model):
    return start(tiny_model, "--served_model_name", "tiny", "--api_key", "right").wait()


def test_a_busy_port_is_an_error_and_no_other_is_taken(tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "swift.cli", "deploy", "--model", str(tiny_model), "--port", str(port)]
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and f"127.0.0.1:{port} cannot be listened on" in done.stderr
    assert time.monotonic() - begin < 30


def test_the_world_is_not_served_without_a_key(tiny_model):
    command = [sys.executable, "-m", "swift.cli", "deploy", "--model", str(tiny_model), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "--api_key" in done.stderr
