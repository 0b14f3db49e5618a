"""Bodies that mean harm, or know no better. Beside each, a client that behaves gets its answers, and no attack is in the log."""

import json
import threading
import time

import pytest

from tests.serve.conftest import CHAT, KEY, MARKER, is_error

POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("depth", [90, 900, 100_000])
def test_deep_json_is_refused_everywhere(target, path, depth):
    for field, opens, closes in (
        ("messages", "[", "]"),
        ("metadata", '{"a":', "}"),
        ("chat_template_kwargs", '{"a":', "}"),
        ("input", "[", "]"),
    ):
        body = f'{{"model": "tiny", "{field}": {opens * depth}1{closes * depth}}}'.encode()
        status, found = target.post(path, body, KEY)
        assert status == 400 and is_error(found)


@pytest.mark.parametrize("depth", [90, 900, 100_000])
def test_deep_schemas_are_refused(target, depth):
    schema = '{"items":' * depth + "{}" + "}" * depth
    message = json.dumps(CHAT)[:-1]
    for field in (
        f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}',
        f'"structured_outputs": {{"json": {schema}}}',
        f'"tools": [{{"type": "function", "function": {{"name": "x", "parameters": {schema}}}}}]',
    ):
        status, found = target.post("/v1/chat/completions", f"{message}, {field}}}".encode(), KEY)
        assert status == 400 and is_error(found)


def test_deep_arguments_of_a_call_are_text(target):
    call = {"id": "a", "type": "function", "function": {"name": "x", "arguments": "[" * 100_000}}
    messages = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "x"}]
    status, found = target.post("/v1/chat/completions", {**CHAT, "messages": messages}, KEY)
    assert status == 400 and is_error(found)  # its tokens exceed the context


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"{}" + b"\x00",
        b"null",
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
    ]
    + [f'{{"model": "tiny", "prompt": "x", "temperature": {number}}}'.encode() for number in ("NaN", "Infinity", "-Infinity", "1e999")],
)
def test_what_is_no_json_is_refused(target, body):
    status, found = target.post("/v1/completions", body, KEY)
    assert status == 400 and is_error(found)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 10**9},
        {"n": 128, "prompt": ["x"] * 2000},
        {"prompt": ["x"] * 100_000},
        {"max_tokens": 10**18},
        {"max_tokens": 10**30},
        {"max_tokens": -1},
        {"max_tokens": True},
        {"stop": ["x"] * 10_000},
        {"stop": "x" * 10**6},
        {"logit_bias": {str(token): 1 for token in range(100_000)}},
        {"logit_bias": {"999999": 1}},
        {"logit_bias": {"-1": 1}},
        {"stop_token_ids": [999_999], "min_tokens": 2},
        {"stop_token_ids": list(range(100_000))},
        {"repetition_penalty": 1e-300},
        {"seed": 2**64},
        {"prompt": [1] * 10**6},
        {"prompt": [999_999]},
        {"prompt": [2**31]},
        {"prompt": [-1]},
        {"prompt": [True]},
        {"prompt": [1.5]},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ""},
        {"prompt": ["x", 1]},
        {"prompt": "x " * 10**5},
        {"prompt": "x" * (2**21 + 1)},
        {"metadata": {"a": "x" * 10**6}},
        {"user": "x" * 10**6},
    ],
    ids=lambda change: "-".join(change) + str(len(json.dumps(change))),
)
def test_numbers_and_lists_out_of_range_are_refused(target, change):
    status, found = target.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2, **change}, KEY)
    assert status == 400 and is_error(found)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "\x00\x01\u202e\ufffe"},
        {"prompt": "e" + "\u0301" * 1000},
        {"prompt": [0]},
        {"temperature": 1e-320},
        {"temperature": 2, "top_p": 0, "min_p": 1, "top_k": 2**31 - 1},
        {"repetition_penalty": 0.01, "presence_penalty": 2, "frequency_penalty": -2},
        {"logit_bias": {str(token): -100 for token in range(200)}, "logprobs": 20},
        {"seed": -(2**63), "n": 3},
        {"stop": ["\x00", "x" * 1000]},
        {"min_tokens": 2**31 - 1},
    ],
    ids=lambda change: "-".join(change) + str(len(json.dumps(change))),
)
def test_odd_values_that_mean_something_are_answered(target, change):
    status, found = target.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3, **change}, KEY)
    assert status == 200 and found["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    "grammar",
    [
        {"json": {"type": "integer", "multipleOf": 999_983}},
        {"grammar": "start: " + " | ".join(f'"w{number}"' for number in range(15_000))},
        {"regex": "(" * 100_000 + "a" + ")" * 100_000},
        {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
        {"json": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(20_000)}}},
        {"json": {"enum": [f"v{number}" for number in range(40_000)]}},
        {"choice": [f"choice {number}" for number in range(10_000)]},
        {"regex": "a{1000000}"},
        {"regex": "["},
        {"grammar": "begin: x"},
        {"json": {"$ref": "#/nowhere"}},
    ],
    ids=lambda grammar: f"{next(iter(grammar))}{len(json.dumps(grammar))}",
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_cannot_be_kept_to_is_refused(target, grammar, stream):
    begin = time.monotonic()
    status, found = target.post("/v1/chat/completions", {**CHAT, "max_tokens": 20, "stream": stream, "structured_outputs": grammar}, KEY)
    assert status == 400 and is_error(found)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("regex", ["(a{1,1000}){1,1000}", "((a{1,100}){1,100}){1,100}", "[ab]*a[ab]{60}", "(x+x+)+y", "(.*a.{20})"])
def test_a_regex_that_is_slow_elsewhere_is_not(target, regex):
    status, found = target.post("/v1/chat/completions", {**CHAT, "structured_outputs": {"regex": regex}}, KEY)
    assert status == 200 and found["choices"]


def test_many_long_texts_at_once_hold_up_nobody(target):
    body = {"prompt": f"{MARKER} " * 30_000}
    found = []
    threads = [threading.Thread(target=lambda: found.append(target.post("/tokenize", body, KEY)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 4


def test_many_embeddings_at_once_hold_up_nobody(target):
    status, found = target.post("/v1/embeddings", {"model": "tiny", "input": [f"{MARKER} {number}" * 20 for number in range(300)]}, KEY)
    assert status == 200 and len(found["data"]) == 300


def test_the_log_holds_no_prompt_and_no_key(hostile):
    """Not in the access log, nor in anything else that the server or the engine said through all the tests above."""
    assert hostile.post("/v1/chat/completions", CHAT, KEY)[0] == 200
    assert '"path": "/v1/chat/completions", "status": 200' in hostile.log
    assert MARKER not in hostile.log
    assert KEY not in hostile.log
    assert "Traceback" not in hostile.log
