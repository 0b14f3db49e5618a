"""Interleaving. The expected orders were made with datasets 5.2.0: interleave_datasets over rows 0, 1, ... of each set."""

import numpy as np
import pytest

from swift.data.load import load_records
from swift.data.mix import choices, interleave
from swift.errors import ConfigError, DataError
from tests.data.conftest import chat


def pairs(lengths, probabilities, strategy, seed):
    chosen, rows = interleave(lengths, probabilities, strategy, seed)
    return list(zip(chosen.tolist(), rows.tolist(), strict=True))


def test_the_mixture_is_that_of_interleave_datasets():
    short = [(1, 0), (0, 0), (0, 1), (0, 2)]
    assert pairs([3, 8], [0.3, 0.7], "first_exhausted", 0) == short
    assert pairs([3, 8], [0.3, 0.7], "all_exhausted", 0) == [*short, *((1, row) for row in range(1, 8))]


def test_the_first_exhausted_data_set_ends_the_mixture_and_no_row_comes_twice():
    made = pairs([50, 400], [0.4, 0.6], "first_exhausted", 7)
    assert len(set(made)) == len(made)
    assert made[-1] in ((0, 49), (1, 399))


def test_all_exhausted_holds_every_row_at_least_once_and_ends_with_the_last_of_them():
    made = pairs([20, 300, 45], [0.2, 0.3, 0.5], "all_exhausted", 1)
    assert {*made} == {(number, row) for number, length in enumerate((20, 300, 45)) for row in range(length)}
    assert made.count(made[-1]) == 1


def test_shares_are_the_probabilities():
    chosen, _ = interleave([10**6, 10**6], [0.7, 0.3], "first_exhausted", 42)
    # Of about 1.43 million draws the share has a standard deviation of sqrt(0.21 / 1.43e6) = 0.0004.
    assert abs((chosen == 0).mean() - 0.7) < 0.002


def test_draws_can_be_entered_anywhere():
    whole = np.concatenate([next(batches) for batches in [choices([0.2, 0.8], 3)]])
    assert next(choices([0.2, 0.8], 3, start=1000))[:500].tolist() == whole[1000:1500].tolist()


def test_data_sets_are_mixed_when_they_are_read(write, capsys):
    first = write([chat(f"a{index}", "x") for index in range(10)], "a.jsonl")
    second = write([chat(f"b{index}", "x") for index in range(200)], "b.jsonl")
    loaded = load_records([first, second], interleave_prob=[0.5, 0.5], shuffle=False)
    names = [record.messages[0].content for record in loaded.train]
    chosen, rows = interleave([10, 200], [0.5, 0.5], "first_exhausted", 42)
    assert names == [f"{'ab'[number]}{row}" for number, row in zip(chosen, rows, strict=True)]
    assert f"10 rows from the 10 of {first}" in capsys.readouterr().err


def test_shuffling_takes_other_rows_of_the_larger_set_than_its_first(write):
    first = write([chat(f"a{index}", "x") for index in range(10)], "a.jsonl")
    second = write([chat(f"b{index}", "x") for index in range(200)], "b.jsonl")
    loaded = load_records([first, second], interleave_prob=[0.5, 0.5])
    taken = [int(record.messages[0].content[1:]) for record in loaded.train if record.messages[0].content[0] == "b"]
    assert len({*taken}) == len(taken) and max(taken) > 100


@pytest.mark.parametrize("probabilities", [[1.0], [0.5, 0.4], [1.0, 0.0], [0.2, 0.3, 0.5]])
def test_probabilities_that_mean_nothing_are_refused_before_anything_is_read(probabilities):
    with pytest.raises(ConfigError, match="interleave_prob"):
        load_records(["none-a.jsonl", "none-b.jsonl"], interleave_prob=probabilities)
    with pytest.raises(ConfigError, match="unknown stopping_strategy"):
        load_records(["none-a.jsonl"], stopping_strategy="never")


def test_a_data_set_without_rows_cannot_be_mixed(write):
    good, bad = write([chat("q", "a")] * 9, "a.jsonl"), write([chat("q")], "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: no row is left to interleave"):
        load_records([good, bad], interleave_prob=[0.5, 0.5])
