"""The server beside the official client, and beside callers who send what they should not."""

import json
import threading

import pytest
from openai import APIStatusError, NotFoundError, OpenAI

IMAGE = "messages[0].content[0].image_url"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Is it snowing?"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_chat_completion_has_openais_shape(client):
    answer = client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chunks_make_the_whole_answer(client):
    whole = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_of_a_seed_differ_and_come_again(client):
    settings = {**CHAT, "temperature": 1.0, "n": 3, "seed": 7}
    first, second = (client.chat.completions.create(**settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]


def test_log_probabilities_come_with_each_token(client):
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    assert content[0].top_logprobs[0].token == content[0].token  # greedy
    assert bytes(content[0].bytes).decode() == content[0].token


def test_a_json_schema_is_kept(client):
    schema = {"type": "object", "properties": {"level": {"enum": ["red", "blue"]}}, "required": ["level"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "alert", "schema": schema}}
    answer = client.chat.completions.create(**{**CHAT, "max_tokens": 200, "temperature": 1.0}, response_format=wanted)
    assert json.loads(answer.choices[0].message.content)["level"] in ("red", "blue")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "warn",
            "description": "Warn a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Bern"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def test_a_required_call_has_arguments_that_fit_its_schema(client):
    settings = {**CHAT, "max_tokens": 200, "temperature": 1.0, "seed": 1, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**settings, tools=TOOLS, tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "warn"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Bern")
    assert answer.choices[0].finish_reason == "tool_calls"
    chunks = list(client.chat.completions.create(**settings, tools=TOOLS, tool_choice="required", stream=True))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert parts[0].function.name == "warn" and parts[0].id
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_and_its_result_go_back_into_the_conversation(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "warn", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Warn Oslo."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    assert client.chat.completions.create(**{**CHAT, "messages": messages}, tools=TOOLS).choices[0].message is not None


def test_the_best_of_several_answers_are_given(client):
    """Seeds of the answers to one prompt follow one another, so that each can be drawn alone."""
    settings = {"model": "tiny", "max_tokens": 5, "temperature": 1.5}
    best = client.completions.create(**settings, prompt=["Snow", "Ice"], n=2, best_of=5, seed=3)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert best.usage.completion_tokens > 20
    for number, prompt in enumerate(["Snow", "Ice"]):
        drawn = client.completions.create(**settings, prompt=prompt, n=5, seed=3, logprobs=0).choices
        means = {choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs) for choice in drawn}
        likeliest = sorted(means, key=lambda text: -means[text])[:2]
        assert [choice.text for choice in best.choices[2 * number : 2 * number + 2]] == likeliest
        assert best.choices[0].logprobs is None
    with pytest.raises(APIStatusError, match="best_of is not available with stream"):
        client.completions.create(**settings, prompt="Snow", best_of=2, stream=True)


def test_a_raw_prompt_gets_no_template(server, client):
    answer = client.completions.create(model="tiny", prompt="Snow", max_tokens=4, temperature=0)
    ids = server.post("/tokenize", {"prompt": "Snow"})[1]["tokens"]
    assert answer.usage.prompt_tokens == len(ids)
    of_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=4, temperature=0)
    assert of_ids.choices[0].text == answer.choices[0].text
    several = client.completions.create(model="tiny", prompt=["Snow", "Rain falls"], max_tokens=4, temperature=0, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == answer.choices[0].text


def test_an_echo_gives_the_log_probabilities_of_the_prompt(client):
    answer = client.completions.create(model="tiny", prompt="Heavy snow", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "Heavy snow"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens) == "Heavy snow"
    assert answer.usage.completion_tokens == 0


def test_a_response_streams_and_comes_whole(client):
    whole = client.responses.create(model="tiny", input="Is it snowing?", max_output_tokens=8, temperature=0, instructions="Be brief.")
    assert whole.status in ("completed", "incomplete")
    assert whole.output[-1].status == whole.status
    events = list(
        client.responses.create(
            model="tiny", input="Is it snowing?", max_output_tokens=8, temperature=0, instructions="Be brief.", stream=True
        )
    )
    assert events[0].type == "response.created"
    assert events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_embeddings_have_length_one_and_both_codings_agree(client):
    as_floats = client.embeddings.create(model="tiny", input=["Snow", "Rain"], encoding_format="float")
    coded = client.embeddings.create(model="tiny", input=["Snow", "Rain"])  # the client asks for base64 and decodes it
    for one, other in zip(as_floats.data, coded.data, strict=True):
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-5)
        assert other.embedding == pytest.approx(one.embedding, abs=1e-6)


def test_models_are_listed_and_an_unknown_one_is_not_found(client):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("tiny").owned_by == "swift"
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(**{**CHAT, "model": "other"})
    assert caught.value.body["code"] == "model_not_found"


def test_tokens_and_text_are_each_others_inverse(server):
    text = "Snow 雪 falls."
    status, found = server.post("/tokenize", {"prompt": text})
    assert status == 200 and found["count"] == len(found["tokens"])
    assert server.post("/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": text})
    status, found = server.post("/tokenize", {"messages": CHAT["messages"], "return_token_strs": True})
    assert "<|im_start|>" in found["token_strs"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "<= 2"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "robot"),
        ({"n": "1"}, "n", "got `str`"),
        ({"snow": 1}, "snow", "unknown field snow"),
        ({"modalities": ["audio"]}, "modalities", "text only"),
        ({"functions": []}, "functions", "tools took its place"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"stream_options": {}, "stream": False}, None, "needs stream"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"logit_bias": {"snow": 1}}, "logit_bias", "regex"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not read it"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}}, None, "cannot be read"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, IMAGE, "text only"),
        ({"max_tokens": 5, "messages": [{"role": "user", "content": "snow " * 5000}]}, None, "context 2048"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_honoured_is_refused_by_name(server, change, param, message, stream):
    status, body = server.post("/v1/chat/completions", {**CHAT, "stream": stream, **change})
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param
    assert message in body["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"model": "tiny", "messages": ' + b"[" * 200_000, b'"x"']
)
def test_a_body_that_is_no_request_gets_one_error(server, body):
    status, found = server.post("/v1/chat/completions", body)
    assert status == 400 and found["error"]["message"]


def test_wrong_routes_and_methods_have_openais_error_too(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)):
        found, body = server.send(method, path, None)
        assert (found, body["error"]["code"]) == (status, None)


def test_many_requests_at_once_are_all_answered(client):
    texts = {}

    def ask(number):
        texts[number] = client.completions.create(model="tiny", prompt=f"Snow {number % 5}", max_tokens=6, temperature=0).choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 40
    assert all(texts[number] == texts[number % 5] for number in range(40))


def test_metrics_count_what_was_done(server, client):
    def value(name):
        lines = server.get("/metrics")[1].splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    before = value("vllm:generation_tokens_total")
    client.completions.create(model="tiny", prompt="Snow", max_tokens=5, temperature=0, extra_body={"ignore_eos": True})
    assert value("vllm:generation_tokens_total") == before + 5
    assert value("swift_time_to_first_token_seconds_count") > 0


def test_the_description_of_the_api_lists_every_route(server):
    status, found = server.get("/openapi.json")
    assert status == 200
    for path in found["paths"]:
        assert server.send("OPTIONS", path.replace("{model}", "tiny"), None)[0] != 404


def test_sigterm_lets_requests_under_way_finish(start, tiny_model):
    server = start(tiny_model, "--served_model_name", "tiny").wait()
    found = []
    thread = threading.Thread(
        target=lambda: found.append(server.post("/v1/chat/completions", {**CHAT, "max_tokens": 300, "ignore_eos": True}))
    )
    thread.start()
    server.until(lambda: server.get("/health")[1]["requests"] == 1)
    server.process.terminate()
    thread.join()
    assert found[0][0] == 200 and found[0][1]["usage"]["completion_tokens"] == 300
    assert server.process.wait(30) == 0


def test_a_full_queue_asks_to_come_again(start, tiny_model):
    server = start(tiny_model, "--served_model_name", "tiny", "--max_batch_size", "1", "--max_queue", "0").wait()
    slow = threading.Thread(target=lambda: server.post("/v1/chat/completions", {**CHAT, "max_tokens": 1000, "ignore_eos": True}))
    slow.start()
    server.until(lambda: server.get("/health")[1]["requests"] == 1)
    status, body = server.post("/v1/chat/completions", CHAT)
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(server.headers["Retry-After"]) >= 1
    assert server.get("/ready")[0] == 503 and server.get("/health")[0] == 200
    slow.join()


def test_keys_are_wanted_everywhere_but_for_health(start, tiny_model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    server = start(tiny_model, "--served_model_name", "tiny", "--api_key", f"@{keys}", "third").wait()
    for key, status in ((None, 401), ("wrong", 401), ("first", 200), ("second", 200), ("third", 200)):
        assert server.get("/v1/models", key)[0] == status
        assert server.post("/v1/chat/completions", CHAT, key)[0] == status
    assert server.get("/metrics")[0] == 401
    assert server.get("/health")[0] == 200
    with pytest.raises(APIStatusError):
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_tokens_of_all_prompts_are_counted_once(server):
    """In usage and in the metrics: two prompts, of which each has two answers."""
    before = server.metric("swift_prompt_tokens_total")
    status, body = server.post("/v1/completions", {"model": "tiny", "prompt": [[5, 6, 7], [8]], "max_tokens": 1, "n": 2})
    assert (status, body["usage"]["prompt_tokens"]) == (200, 4)
    assert server.metric("swift_prompt_tokens_total") - before == 4
