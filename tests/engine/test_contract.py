"""What holds for each engine that computes in float32 here; llama.cpp, which has to be built, is tested along where it is installed."""

from importlib.util import find_spec

import pytest
import torch

from swift.config.commands import InferConfig
from swift.config.options import build as build_config
from swift.engine.answers import answers, pieces
from swift.engine.base import Engine, Request, Sampling
from swift.engine.load import make_engine, source_of
from swift.errors import DataError
from tests.engine.test_native import VOCABULARY, greedy, random_prompts
from tests.families import build
from tests.hub.tiny_gguf import write_gguf
from tests.serve.conftest import Server
from tests.tiny import make_tokenizer

ENGINES = ["native", "transformers", "remote", "openvino", *(["llamacpp"] if find_spec("llama_cpp") else [])]
OPTIONS = {
    "transformers": {"max_batch_size": 3},
    "openvino": {"openvino_weight_format": "fp32"},
}
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model of ``greedy`` with a tokenizer, in a folder; beside it as a GGUF file."""
    folder = tmp_path_factory.mktemp("contract") / "model"
    build("llama", vocab_size=VOCABULARY, eos_token_id=2).save_pretrained(folder)
    make_tokenizer(folder)
    write_gguf(folder, folder.parent / "model.gguf")
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, model, tmp_path_factory):
    name, server = request.param, None
    options = {"model": str(model), "val_dataset": "none.jsonl", "infer_backend": name, **OPTIONS.get(name, {})}
    if name == "llamacpp":
        options["model"] = str(model.parent / "model.gguf")
    if name == "remote":
        server = Server(model, tmp_path_factory.mktemp("server") / "log.txt", "--served_model_name", "tiny").wait()
        options["remote_url"] = f"{server.url}/v1"
    made = make_engine(source_of(build_config(InferConfig, ("argument", options))))
    yield made
    made.close()
    if server is not None:
        server.end()


def ask(engine, prompts, sampling=GREEDY):
    requests = [Request(id=str(number), prompt=tuple(prompt), sampling=sampling) for number, prompt in enumerate(prompts)]
    return list(answers(engine, requests))


def text_of(ids):
    return make_tokenizer().decode(ids, skip_special_tokens=True)


def test_it_is_an_engine(engine):
    assert isinstance(engine, Engine)
    assert engine.is_idle
    assert engine.step() == []


def test_answers_to_many_are_those_of_generate_in_order(engine):
    prompts = random_prompts()
    wanted = greedy("llama", prompts)
    found = ask(engine, prompts)
    assert [answer.text for answer in found] == [text_of(ids) for ids in wanted]
    assert [answer.finish_reason for answer in found] == ["length" if len(ids) == 12 else "stop" for ids in wanted]
    assert engine.is_idle


def test_the_tokens_of_an_answer_spell_its_text(engine):
    found = ask(engine, random_prompts())
    assert [text_of(answer.token_ids) for answer in found] == [answer.text for answer in found]


def test_pieces_make_the_whole_text(engine):
    prompt = tuple(random_prompts()[2])
    (whole,) = ask(engine, [prompt])
    assert "".join(pieces(engine, Request(id="a", prompt=prompt, sampling=GREEDY))) == whole.text


def test_an_answer_ends_before_a_stop_word(engine):
    prompt = random_prompts()[2]
    (whole,) = ask(engine, [prompt])
    word = whole.text[2:4]
    (short,) = ask(engine, [prompt], Sampling(max_new_tokens=12, temperature=0, stop_words=(word,)))
    assert (short.text, short.finish_reason) == (whole.text[: whole.text.index(word)], "stop")


def test_the_longest_answer_is_kept_to(engine):
    found = ask(engine, random_prompts(3), Sampling(max_new_tokens=1, temperature=0))
    assert [answer.text for answer in found] == [text_of(ids[:1]) for ids in greedy("llama", random_prompts(3))]


def test_a_full_context_ends_an_answer(engine):
    (answer,) = ask(engine, [random_prompts(1, seed=3)[0] * 120], Sampling(max_new_tokens=50, temperature=0))
    assert answer.finish_reason == "length"


def test_an_aborted_answer_leaves_the_others(engine):
    prompts = random_prompts(2)
    engine.add(Request(id="long", prompt=tuple(prompts[0]), sampling=Sampling(max_new_tokens=100, temperature=0)))
    engine.add(Request(id="short", prompt=tuple(prompts[1]), sampling=GREEDY))
    while not (deltas := engine.step()):
        pass
    engine.abort("long")
    engine.abort("long")
    while not engine.is_idle:
        deltas += engine.step()
    assert "".join(delta.text for delta in deltas if delta.id == "short") == text_of(greedy("llama", prompts[1:])[0])
    assert not [delta for delta in deltas if delta.id == "long" and delta.finish_reason is not None]


def test_an_identifier_may_be_used_again(engine):
    prompt = random_prompts()[1]
    assert ask(engine, [prompt])[0].text == ask(engine, [prompt])[0].text


def test_what_cannot_be_computed_is_refused_and_the_others_go_on(engine):
    prompt = tuple(random_prompts()[1])
    engine.add(Request(id="good", prompt=prompt, sampling=GREEDY))
    with pytest.raises(DataError, match="no adapter 'other' is loaded"):
        engine.add(Request(id="adapter", prompt=prompt, sampling=GREEDY, adapter="other"))
    with pytest.raises(DataError, match="the prompt has 200 tokens, the model's context 128"):
        engine.add(Request(id="long", prompt=(5,) * 200, sampling=GREEDY))
    deltas = []
    while not engine.is_idle:
        deltas += engine.step()
    assert "".join(delta.text for delta in deltas) == text_of(greedy("llama", [list(prompt)])[0])


def test_a_seed_gives_the_same_sample_again(engine):
    prompts = random_prompts(3)
    one, again, other = (
        [answer.text for answer in ask(engine, prompts, Sampling(max_new_tokens=12, temperature=0.9, top_p=0.95, seed=seed))]
        for seed in (5, 5, 6)
    )
    assert one == again != other


def test_a_repetition_penalty_is_that_of_generate(engine):
    prompt = random_prompts()[4]
    wanted = build("llama", vocab_size=VOCABULARY, eos_token_id=2).generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.5,
        pad_token_id=0,
    )
    (found,) = ask(engine, [prompt], Sampling(max_new_tokens=12, temperature=0, repetition_penalty=1.5))
    assert found.text == text_of(wanted[0, len(prompt) :].tolist())
