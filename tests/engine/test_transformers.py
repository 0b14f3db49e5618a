import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swift.engine.answers import answers, pieces
from swift.engine.base import Request, Sampling
from swift.engine.transformers import TransformersEngine, complete, stream
from swift.errors import DataError
from swift.model.load import Loaded

PROMPTS = ["What is snow", "Heavy snow is expected in the north, and the roads"]


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def ids(tokenizer, text):
    return tokenizer(text).input_ids


def test_a_greedy_answer_is_the_argmax_of_each_step(model, tokenizer):
    prompt = ids(tokenizer, PROMPTS[0])
    expected = list(prompt)
    for _ in range(8):
        expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    answer = complete(model, tokenizer, [prompt], Sampling(max_new_tokens=8, temperature=0))[0]
    assert answer.token_ids == expected[len(prompt) :]
    assert answer.finish_reason == "length"


def test_prompts_of_a_batch_are_answered_as_if_alone(model, tokenizer):
    prompts = [ids(tokenizer, text) for text in PROMPTS]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    together = complete(model, tokenizer, prompts, greedy)
    alone = [complete(model, tokenizer, [prompt], greedy)[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def engine_of(model, tokenizer, **options):
    return TransformersEngine(Loaded(model, tokenizer, torch.device("cpu"), torch.float32, "test"), **options)


def test_an_engine_of_batches_answers_in_the_order_of_its_requests(model, tokenizer):
    greedy = Sampling(max_new_tokens=12, temperature=0)
    prompts = [tuple(ids(tokenizer, text)) for text in [*PROMPTS, *PROMPTS]]
    wanted = [complete(model, tokenizer, [list(prompt)], greedy)[0] for prompt in prompts]
    for size in (1, 3):
        requests = [Request(id=str(number), prompt=prompt, sampling=greedy) for number, prompt in enumerate(prompts)]
        found = list(answers(engine_of(model, tokenizer, max_batch_size=size), requests))
        assert [(answer.text, answer.token_ids, answer.finish_reason) for answer in found] == [
            (answer.text, answer.token_ids, answer.finish_reason) for answer in wanted
        ]


def test_pieces_make_the_whole_answer(model, tokenizer):
    prompt = ids(tokenizer, PROMPTS[1])
    greedy = Sampling(max_new_tokens=12, temperature=0)
    written = pieces(engine_of(model, tokenizer), Request(id="a", prompt=tuple(prompt), sampling=greedy))
    assert "".join(written) == complete(model, tokenizer, [prompt], greedy)[0].text


def test_a_stop_word_ends_the_answer_before_it(model, tokenizer):
    prompt = tuple(ids(tokenizer, PROMPTS[1]))
    whole = complete(model, tokenizer, [list(prompt)], Sampling(max_new_tokens=12, temperature=0))[0].text
    word = whole[3:5]
    for size in (1, 2):
        sampling = Sampling(max_new_tokens=12, temperature=0, stop_words=(word,))
        requests = [Request(id=str(number), prompt=prompt, sampling=sampling) for number in range(size)]
        for answer in answers(engine_of(model, tokenizer, max_batch_size=size), requests):
            assert (answer.text, answer.finish_reason) == (whole[: whole.index(word)], "stop")


def test_an_answer_ends_at_a_stop_word_of_its_own_and_not_of_the_prompt(model, tokenizer):
    prompt = ids(tokenizer, PROMPTS[1])
    greedy = Sampling(max_new_tokens=12, temperature=0)
    whole = complete(model, tokenizer, [prompt], greedy)[0].text
    across = (PROMPTS[1] + whole)[len(PROMPTS[1]) - 2 : len(PROMPTS[1]) + 2]
    assert across not in whole
    for word, expected, reason in ((across, whole, "length"), (whole[4:7], whole[: whole.index(whole[4:7])], "stop")):
        stopped = Sampling(max_new_tokens=12, temperature=0, stop_words=(word,))
        for size in (1, 2):
            requests = [Request(id=str(number), prompt=tuple(prompt), sampling=stopped) for number in range(size)]
            for answer in answers(engine_of(model, tokenizer, max_batch_size=size), requests):
                assert (answer.text, answer.finish_reason) == (expected, reason)


def test_an_aborted_request_leaves_the_others(model, tokenizer):
    engine = engine_of(model, tokenizer)
    long = Sampling(max_new_tokens=1500, temperature=1.0)
    engine.add(Request(id="long", prompt=(5, 6), sampling=long))
    engine.add(Request(id="short", prompt=(5, 6), sampling=Sampling(max_new_tokens=3, temperature=0)))
    assert engine.step()[0].id == "long"
    engine.abort("long")
    deltas = []
    while not engine.is_idle:
        deltas += engine.step()
    assert {delta.id for delta in deltas} == {"short"}
    assert sum(len(delta.token_ids) for delta in deltas) == 3


def test_what_generate_cannot_do_is_refused_by_name(model, tokenizer):
    with pytest.raises(DataError, match=r"logit_bias, logprobs: not with"):
        engine_of(model, tokenizer).add(Request(id="a", prompt=(5,), sampling=Sampling(logit_bias={5: 1.0}, logprobs=1)))


def test_a_closed_stream_stops_the_generation(model, tokenizer):
    pieces = stream(model, tokenizer, ids(tokenizer, PROMPTS[0]), Sampling(max_new_tokens=1500, temperature=1.0))
    next(pieces)
    pieces.close()  # joins the thread: it would take long if it went on


def test_an_answer_that_is_let_go_where_it_is_generated_stops(model, tokenizer):
    """As when Python's collector finds it while it runs in that thread."""
    sampling = Sampling(max_new_tokens=400, min_new_tokens=400, temperature=0)
    tokens = stream(model, tokenizer, ids(tokenizer, PROMPTS[0]), sampling)
    has_begun, is_closed = threading.Event(), threading.Event()

    def let_go(*_):
        if has_begun.is_set() and not is_closed.is_set():
            tokens.close()
            is_closed.set()

    hook = model.register_forward_pre_hook(let_go)
    next(tokens)
    has_begun.set()
    assert is_closed.wait(30)
    hook.remove()
    assert list(tokens) == []


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(model, tokenizer):
    prompt = ids(tokenizer, PROMPTS[0])
    first = complete(model, tokenizer, [prompt], Sampling(max_new_tokens=1, temperature=0))[0].token_ids[0]
    model.generation_config.eos_token_id = first
    try:
        answer = complete(model, tokenizer, [prompt], Sampling(max_new_tokens=5, temperature=0))[0]
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "stop")


def test_the_same_seed_gives_the_same_sample(model, tokenizer):
    prompt = ids(tokenizer, PROMPTS[0])
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(complete(model, tokenizer, [prompt], Sampling(max_new_tokens=12, temperature=1.0))[0].token_ids)
    assert answers[0] == answers[1]


def test_a_prompt_that_fills_the_context_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="context 5"):
        complete(model, tokenizer, [[4] * 5], Sampling(max_model_len=5))


def test_requests_with_less_room_are_answered_as_if_alone(model, tokenizer):
    """A batch is generated with one length for all, which would be that of the one with the least room: 12 - 9 tokens."""
    sampling = Sampling(max_new_tokens=12, max_model_len=12, temperature=0)
    requests = [Request(id=str(length), prompt=(5,) * length, sampling=sampling) for length in (9, 5)]
    found = list(answers(engine_of(model, tokenizer, max_batch_size=2), requests))
    assert [len(answer.token_ids) for answer in found] == [3, 7]


def test_an_answer_that_ended_before_others_of_its_batch_holds_no_padding(model, tokenizer):
    prompts = [tuple(ids(tokenizer, text)) for text in PROMPTS]
    whole = [complete(model, tokenizer, [list(prompt)], Sampling(max_new_tokens=12, temperature=0))[0] for prompt in prompts]
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_words=(whole[0].text[2:5],))
    requests = [Request(id=str(number), prompt=prompt, sampling=sampling) for number, prompt in enumerate(prompts)]
    for size in (1, 2):
        first = next(iter(answers(engine_of(model, tokenizer, max_batch_size=size), requests)))
        assert first.token_ids == whole[0].token_ids[: len(first.token_ids)]
        assert len(first.token_ids) < 12


def test_what_no_engine_takes_is_refused(model, tokenizer):
    engine = engine_of(model, tokenizer)
    engine.add(Request(id="a", prompt=(5,), sampling=Sampling(max_new_tokens=2)))
    for request, said in (
        (Request(id="a", prompt=(5,), sampling=Sampling()), "under way"),
        (Request(id="b", prompt=(), sampling=Sampling()), "no tokens"),
        (Request(id="c", prompt=(5,), sampling=Sampling(), adapter="x"), "no adapter 'x'"),
    ):
        with pytest.raises(DataError, match=said):
            engine.add(request)
