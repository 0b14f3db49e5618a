"""Answers under a grammar: whatever a random model prefers, what it writes is what was asked for."""

import json
import re

import pytest
import torch

from swift.engine.answers import answers
from swift.engine.base import Grammar, Request, Sampling
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.errors import DataError
from swift.model.load import Loaded
from tests.families import build
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def engine():
    tokenizer = make_tokenizer()
    model = build("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512)
    return NativeEngine(Loaded(model, tokenizer, torch.device("cpu"), torch.float32, "test"), NativeOptions())


def written(engine, grammar, count=5, **options):
    """Texts of a random model at temperature 1."""
    sampling = Sampling(max_new_tokens=300, temperature=1.0, grammar=grammar, **options)
    requests = [Request(id=str(seed), prompt=(5, 6, 7), sampling=sampling) for seed in range(count)]
    return list(answers(engine, requests))


def test_an_answer_is_one_of_the_choices(engine):
    texts = {answer.text for answer in written(engine, Grammar("choice", '["red", "orange", "yellow\\n\\"x\\""]'), count=20)}
    assert texts <= {"red", "orange", 'yellow\n"x"'}
    assert len(texts) > 1


def test_an_answer_matches_the_regex(engine):
    for answer in written(engine, Grammar("regex", r"[a-c]{2,4}-[0-9]{3}")):
        assert re.fullmatch(r"[a-c]{2,4}-[0-9]{3}", answer.text)
        assert answer.finish_reason == "stop"


def test_an_answer_is_a_value_of_the_schema(engine):
    schema = {
        "type": "object",
        "properties": {"level": {"enum": ["red", "blue"]}, "depth": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["level", "depth"],
        "additionalProperties": False,
    }
    for answer in written(engine, Grammar("json_schema", json.dumps(schema))):
        value = json.loads(answer.text)
        assert value["level"] in ("red", "blue") and 0 <= value["depth"] <= 99 and len(value) == 2


def test_answers_with_and_without_a_grammar_share_a_batch(engine):
    plain = Sampling(max_new_tokens=9, temperature=0, ignore_eos=True)
    guided = Sampling(max_new_tokens=9, temperature=0, grammar=Grammar("choice", '["snow"]'))
    alone = next(iter(answers(engine, [Request(id="a", prompt=(5, 6), sampling=plain)])))
    both = list(answers(engine, [Request(id="b", prompt=(5, 6), sampling=guided), Request(id="a", prompt=(5, 6), sampling=plain)]))
    assert both[0].text == "snow"
    assert both[1].token_ids == alone.token_ids


@pytest.mark.parametrize("grammar", [Grammar("regex", "(["), Grammar("lark", "start: missing"), Grammar("json_schema", '{"type": 7}')])
def test_a_grammar_that_cannot_be_read_is_refused(engine, grammar):
    with pytest.raises(DataError, match="cannot be read"):
        written(engine, grammar, count=1)
    assert engine.step() == []


def test_a_grammar_that_its_library_gives_up_ends_its_answer_alone(engine):
    plain = Sampling(max_new_tokens=9, temperature=0, ignore_eos=True)
    alone = next(iter(answers(engine, [Request(id="a", prompt=(5, 6), sampling=plain)])))
    guided = Sampling(max_new_tokens=9, temperature=0, grammar=Grammar("regex", "a{1000000}"))
    for _ in range(2):
        both = list(answers(engine, [Request(id="b", prompt=(5, 6), sampling=guided), Request(id="a", prompt=(5, 6), sampling=plain)]))
        assert both[0].finish_reason == "abort"
        assert both[1].token_ids == alone.token_ids
