"""Answers from servers: this project's own, and ones that are overloaded, broken or refuse."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.engine.answers import answers
from swift.engine.base import Sampling
from swift.engine.remote import Endpoint
from swift.errors import ConfigError, DataError, MachineError
from swift.evaluate.written import UrlEngine, Written, remote_engine
from tests.serve.conftest import start

__all__ = ["start"]  # a fixture

GREEDY = Sampling(max_new_tokens=6, temperature=0)


def config(url, **options):
    return build(EvalConfig, ("argument", {"eval_url": url, "eval_dataset": ["x"], "eval_mode": "generate", **options}))


def chat(id, text="Is it snowing?", **sampling):
    return Written(id=str(id), messages=({"role": "user", "content": text},), sampling=Sampling(**{"max_new_tokens": 6, **sampling}))


@contextlib.contextmanager
def served(replies):
    """A server that gives each of ``replies``, (status, JSON), in their order, the last one for ever; what was asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self._reply(*(replies.pop(0) if len(replies) > 1 else replies[0]))

        def do_GET(self):
            self._reply(200, {"data": [{"id": "tiny"}, {"id": "large"}]})

        def _reply(self, status, body):
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(text, reason="stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}], "usage": {"completion_tokens": 3}}


def engine(url, num_proc=2, pauses_s=(0.01, 0.01)):
    return UrlEngine(Endpoint(url, None, 10.0, "eval"), "tiny", num_proc, pauses_s)


def run(made, *requests):
    try:
        return list(answers(made, requests))
    finally:
        made.close()


def test_our_own_server_answers_messages_and_texts(start, tiny_model):
    """As the model answers the rendered prompt itself: greedy, in both forms."""
    from swift.api import infer

    server = start(tiny_model, "--weight_format", "torch")
    server.until(lambda: server.get("/ready")[0] == 200, timeout_s=240)
    made = remote_engine(config(server.url + "/v1", eval_num_proc=3))
    rendered = "<|im_start|>user\nIs it snowing?<|im_end|>\n<|im_start|>assistant\n"
    requests = [chat(number, temperature=0.0) for number in range(4)]
    found = run(made, *requests, Written(id="text", text=rendered, sampling=GREEDY))
    (wanted,) = infer(model=str(tiny_model), prompts=["Is it snowing?"], max_new_tokens=6, temperature=0, weight_format="torch")
    assert [answer.text for answer in found] == [wanted] * 5
    assert all(len(answer.token_ids) == 6 for answer in found)


def test_what_is_asked_is_written_as_openai_has_it():
    with served([reply(" B\n\nQuestion: C")]) as (url, asked):
        request = chat(0, temperature=0.0, stop_words=("\n\n", "a", "b", "c", "d"))
        (found,) = run(engine(url), request)
    assert asked == [
        (
            "/v1/chat/completions",
            {
                "model": "tiny",
                "max_tokens": 6,
                "temperature": 0.0,
                "stop": ["\n\n", "a", "b", "c"],
                "messages": [{"role": "user", "content": "Is it snowing?"}],
            },
        )
    ]
    assert (found.text, found.finish_reason, len(found.token_ids)) == (" B", "stop", 3)


def test_thinking_that_a_server_keeps_apart_is_kept():
    body = {"choices": [{"message": {"content": "B", "reasoning_content": "A?"}, "finish_reason": "length"}]}
    with served([(200, body)]) as (url, _):
        (found,) = run(engine(url), chat(0))
    assert (found.text, found.finish_reason) == ("<think>A?</think>B", "length")


def test_stop_words_end_the_answer_and_not_the_thinking_before_it():
    body = {"choices": [{"message": {"content": "B\nQuestion: C", "reasoning": "Question: A?"}, "finish_reason": "stop"}]}
    with served([(200, body)]) as (url, _):
        (found,) = run(engine(url), chat(0, stop_words=("Question:",)))
    assert found.text == "<think>Question: A?</think>B\n"


def test_an_overloaded_server_is_asked_again():
    with served([(503, {"error": {"message": "busy"}}), (429, {}), reply("A")]) as (url, asked):
        (found,) = run(engine(url), chat(0))
    assert (found.text, len(asked)) == ("A", 3)


def test_a_server_that_stays_overloaded_ends_it_in_one_line():
    with served([(503, {"error": {"message": "busy"}})]) as (url, asked), pytest.raises(MachineError, match="status 503: busy"):
        run(engine(url), chat(0))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "kind", "hint"), [(400, DataError, None), (404, DataError, None), (401, ConfigError, "see --eval_api_key")]
)
def test_a_refusal_is_one_line_and_is_not_asked_again(status, kind, hint):
    with served([(status, {"error": {"message": "no such thing"}})]) as (url, asked):
        with pytest.raises(kind, match=f"status {status}: no such thing") as caught:
            run(engine(url), chat(0))
        assert caught.value.hint == hint
    assert len(asked) == 1


def test_a_question_alone_that_is_refused_has_no_answer():
    with served([reply("A"), (400, {"error": {"message": "too long"}}), reply("C")]) as (url, _):
        found = run(engine(url, num_proc=1), chat(0), chat(1), chat(2))
    assert [(answer.text, answer.finish_reason) for answer in found] == [("A", "stop"), ("", "abort"), ("C", "stop")]


def test_an_answer_that_is_none_is_one_line():
    with served([(200, {"choices": []})]) as (url, _), pytest.raises(MachineError, match="gave no answer that can be read"):
        run(engine(url), chat(0))


def test_nobody_there_is_one_line():
    with pytest.raises(MachineError, match="does not answer") as caught:
        run(engine("http://127.0.0.1:9/v1", pauses_s=()), chat(0))
    assert caught.value.hint == "see --eval_url"


@pytest.mark.parametrize("option", [{"quant_method": "bnb", "quant_bits": 4}, {"infer_backend": "transformers"}])
def test_options_of_engines_are_refused_where_a_server_computes(option):
    with pytest.raises(ConfigError, match=f"--{next(iter(option))} has no effect with --eval_url"):
        config("http://127.0.0.1:9/v1", **option)


def test_a_number_of_requests_is_refused_where_the_model_is_here():
    with pytest.raises(ConfigError, match="--eval_num_proc has no effect without --eval_url"):
        build(EvalConfig, ("argument", {"models": ["m"], "eval_dataset": ["x"], "eval_num_proc": 3}))


def test_the_model_is_one_that_the_server_has():
    with served([reply("A")]) as (url, _):
        assert remote_engine(config(url + "/chat/completions", model="large")).model == "large"
        with pytest.raises(ConfigError, match="serves not larg: there are tiny, large") as caught:
            remote_engine(config(url, model="larg"))
        assert caught.value.hint == "did you mean large?"
        with pytest.raises(ConfigError, match="serves 2 models"):
            remote_engine(config(url))
    with pytest.raises(ConfigError, match="is no http or https address"):
        remote_engine(config("127.0.0.1:8000"))
