"""The choice of a token: worked by hand, and counted over many draws."""

import collections
import math

import pytest
import torch

from swift.engine.base import Sampling, resolved
from swift.engine.native.sampler import Chooser, choose, logprobs, uniform

PROBABILITIES = [0.4, 0.3, 0.2, 0.1]


def chooser(seed=0, prompt=(), ends=(), **options):
    fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | options
    return Chooser(Sampling(**fields), seed, frozenset(prompt), tuple(ends))


def shares(count=4000, **options):
    """How often each of four tokens is drawn."""
    logits = torch.tensor(PROBABILITIES).log().repeat(count, 1)
    tokens = choose(logits, [chooser(seed=1, **options)] * count, list(range(count)))
    found = collections.Counter(tokens)
    return [found[token] / count for token in range(4)]


def one(logits, **options):
    given = chooser(**options) if "given" not in options else options["given"]
    return choose(torch.tensor([logits]), [given], [0])[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),  # squares over their sum
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),  # the token that passes 0.6 is in
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),  # of 4/9, 3/9, 2/9: 7/9 is the first sum of at least 0.7
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),  # at least 0.6 of the largest
        ({"top_p": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(options, expected):
    for found, wanted in zip(shares(**options), expected, strict=True):
        assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 4000))


def test_a_nucleus_wider_than_what_is_sorted_first_is_found():
    count = 5000
    logits = torch.zeros(1, count)
    tokens = choose(logits.repeat(300, 1), [chooser(top_p=0.9)] * 300, list(range(300)))
    assert max(tokens) > 1024


def test_rows_of_a_batch_are_chosen_each_by_its_own_settings():
    logits = torch.tensor(PROBABILITIES).log().repeat(3, 1)
    rows = [chooser(temperature=0.0), chooser(top_k=1), chooser(temperature=0.0, logit_bias={3: 9.0})]
    assert choose(logits, rows, [0, 0, 0]) == [0, 0, 3]


def test_penalties_are_those_of_their_definitions():
    given = chooser(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    for token in (0, 0, 1):
        given.accept(token)
    logits = torch.tensor([2.0, 2.0, 1.5, 0.0])
    given.change(logits)
    assert logits.tolist() == [1.0, 1.25, 1.5, 0.0]  # 2 - 0.5 - 2 * 0.25; 2 - 0.5 - 0.25
    given = chooser(temperature=0.0, repetition_penalty=2.0, prompt=[1])
    given.accept(2)
    logits = torch.tensor([2.0, 2.0, -1.0, -1.0])
    given.change(logits)
    assert logits.tolist() == [2.0, 1.0, -2.0, -1.0]


def test_an_end_is_not_chosen_before_the_least_length():
    given = chooser(temperature=0.0, min_new_tokens=1, ends=[0])
    assert one([5.0, 1.0], given=given) == 1
    given.accept(1)
    assert one([5.0, 1.0], given=given) == 0


def test_log_probabilities_and_the_likeliest_tokens():
    logits = torch.tensor([PROBABILITIES, PROBABILITIES]).log()
    first, second = logprobs(logits, [2, 0], [0, 2])
    assert (first.token_id, first.top) == (2, ())
    assert first.logprob == pytest.approx(math.log(0.2))
    assert [token for token, _ in second.top] == [0, 1]
    assert second.top[1][1] == pytest.approx(math.log(0.3))


def test_numbers_of_seed_and_place_are_spread_evenly_and_always_the_same():
    numbers = [uniform(seed, place) for seed in (-1, 0, 2**63) for place in range(1000)]
    assert len(set(numbers)) == 3000
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / 3000 == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 3000))
    assert uniform(0, 0) == uniform(0, 0)


class Settings:
    def __init__(self, **values):
        self.__dict__.update(values)


def test_what_a_request_leaves_open_is_the_models_own():
    own = Settings(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=None)
    found = resolved(Sampling(top_k=5), own)
    assert (found.temperature, found.top_k, found.top_p, found.repetition_penalty) == (0.6, 5, 0.95, 1.0)
    assert resolved(Sampling(), Settings(do_sample=False, temperature=0.6)).temperature == 0
    assert resolved(Sampling(top_p=0.5), Settings(do_sample=False)).temperature == 1.0


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_a_draw_is_the_same_beside_any_others(options):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    others = [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}]
    for place in range(20):
        alone = choose(logits[None].clone(), [chooser(seed=1, **options)], [place])[0]
        rows = [chooser(seed=1, **options), *(chooser(**other) for other in others)]
        assert choose(logits.repeat(5, 1), rows, [place] * 5)[0] == alone
