import numpy as np
import pytest

from swift.data import packing, prefix
from swift.data.packing import first_fit_decreasing, pack, sequential
from swift.data.prefix import flatten
from swift.errors import DataError


def test_the_longest_rows_are_placed_first_and_each_where_it_fits_first():
    # 7 | 5 | then 4 beside 5, 3 beside 7, 1 beside 5 and 4
    assert first_fit_decreasing([1, 5, 4, 7, 3], capacity=10) == [[3, 4], [1, 2, 0]]


def test_rows_of_one_length_fill_a_pack_before_the_next_begins():
    assert first_fit_decreasing([3] * 5, capacity=7) == [[0, 1], [2, 3], [4]]


def test_packs_are_few():
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    packs = first_fit_decreasing(lengths, capacity=256)
    assert sorted(row for group in packs for row in group) == list(range(2000))
    assert max(sum(lengths[row] for row in group) for group in packs) <= 256
    assert len(packs) <= np.ceil(lengths.sum() / 256) * 1.01


def test_sequential_packs_keep_the_order():
    assert sequential([4, 4, 4, 9, 1, 1], capacity=10) == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize("way", [first_fit_decreasing, sequential])
def test_a_row_longer_than_a_pack_is_an_error(way):
    with pytest.raises(DataError, match="11 tokens does not fit into a pack of 10"):
        way([1, 11], capacity=10)


@pytest.mark.parametrize("way", [first_fit_decreasing, sequential])
def test_no_rows_make_no_packs(way):
    assert way([], capacity=10) == []


def rows(*documents):
    return [{"input_ids": np.array(document)} for document in documents]


def test_rows_that_begin_alike_meet_in_one_pack():
    randomness = np.random.default_rng(0)
    tools = [randomness.integers(0, 1000, 300) for _ in range(6)]
    made = rows(*(np.concatenate([tools[index % 6], randomness.integers(0, 1000, 20 + index)]) for index in range(24)))
    lengths = [len(row["input_ids"]) for row in made]
    packs = pack(made, lengths, capacity=512)
    assert sorted(row for group in packs for row in group) == list(range(24))
    computed = [flatten([made[row]["input_ids"] for row in group], share=True).layout.num_tokens for group in packs]
    assert max(computed) <= 512
    assert len(packs) == 6  # four rows each: 300 + 4 * at most 43 tokens
    assert sum(computed) == 6 * 300 + sum(range(20, 44))


def test_what_all_rows_begin_with_counts_once_a_pack():
    randomness = np.random.default_rng(0)
    system = np.arange(50)
    made = rows(*(np.concatenate([system, 100 + randomness.permutation(500)[:40]]) for _ in range(10)))
    packs = pack(made, [90] * 10, capacity=250)
    assert [len(group) for group in packs] == [5, 5]  # 50 + 5 * 40 tokens


def test_packs_hold_whole_rows_when_nothing_is_shared():
    made = rows(*[[1] * 40 + [index] * 20 for index in range(4)])
    assert pack(made, [60] * 4, capacity=120, share=False) == [[0, 1], [2, 3]]


def test_shared_tokens_are_those_that_a_batch_shares():
    assert packing.MIN_SHARED == prefix.MIN_SHARED
