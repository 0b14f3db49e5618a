import numpy as np
import pytest

from swift.data.collate import flat_batch, flat_batches, padded_batch
from swift.errors import ConfigError

SHORT = {"input_ids": [1, 2], "labels": [-100, 2]}
LONG = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "weights": [0.0, 0.5, 2.0]}


def predictions(batch):
    """(position, target, weight, document) of each prediction."""
    positions = batch.kept_K[batch.row_S]
    return list(zip(positions.tolist(), batch.target_S.tolist(), batch.weight_S.tolist(), batch.document_S.tolist(), strict=True))


def test_rows_are_padded_to_the_longest():
    batch = padded_batch([SHORT, LONG], pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert predictions(batch) == [(0, 2, 1.0, 0), (3, 4, 0.5, 1), (4, 5, 2.0, 1)]
    assert (batch.num_tokens, batch.num_computed) == (5, 6)


def test_padding_can_stand_on_the_left():
    batch = padded_batch([SHORT, LONG], pad_token_id=9, padding_side="left")
    assert batch.input_ids.tolist() == [[9, 1, 2], [3, 4, 5]]
    assert predictions(batch)[0] == (1, 2, 1.0, 0)


def test_an_unknown_side_is_refused():
    with pytest.raises(ConfigError, match="top"):
        padded_batch([SHORT], pad_token_id=9, padding_side="top")


@pytest.mark.parametrize(("multiple", "width"), [(2, 4), (8, 8), (3, 3)])
def test_the_width_can_be_a_multiple(multiple, width):
    assert padded_batch([SHORT, LONG], pad_token_id=9, pad_to_multiple_of=multiple).input_ids.shape == (2, width)


def test_a_padding_token_inside_a_row_is_no_padding():
    assert padded_batch([{**SHORT, "input_ids": [9, 2]}], pad_token_id=9).attention_mask.tolist() == [[1, 1]]


def test_a_flat_row_has_no_padding():
    batch = flat_batch([SHORT, LONG])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert predictions(batch) == [(0, 2, 1.0, 0), (2, 4, 0.5, 1), (3, 5, 2.0, 1)]
    assert batch.num_tokens == batch.num_computed == 5


def test_the_last_shared_token_predicts_the_first_one_of_each_document():
    shared = list(range(100, 120))
    made = [{"input_ids": [*shared, end], "labels": [-100] * 20 + [end]} for end in (7, 8)]
    batch = flat_batch(made)
    assert batch.kept_K.tolist() == [19]
    assert predictions(batch) == [(19, 7, 1.0, 0), (19, 8, 1.0, 1)]
    assert (batch.num_tokens, batch.num_computed) == (42, 22)


def test_a_trained_token_of_a_shared_beginning_counts_for_each_document():
    shared = np.arange(100, 120)
    made = [{"input_ids": np.append(shared, end), "labels": np.append(np.where(shared == 110, shared, -100), end)} for end in (7, 8)]
    assert predictions(flat_batch(made)) == [(9, 110, 1.0, 0), (9, 110, 1.0, 1), (19, 7, 1.0, 0), (19, 8, 1.0, 1)]


def test_what_all_passes_of_a_step_begin_with_is_their_root():
    shared = list(range(100, 120))
    made = [{"input_ids": [*shared, 5, end], "labels": [-100] * 21 + [end], "weights": [0.0] * 21 + [0.5]} for end in (7, 8, 9)]
    first, second = flat_batches([made[:2], made[2:]])
    assert first.root_ids.tolist() == second.root_ids.tolist() == shared  # 5 predicts what is trained
    assert first.input_ids.tolist() == [[5, 7, 5, 8]]
    assert first.layout.root == 20
    assert predictions(first) == [(0, 7, 0.5, 0), (2, 8, 0.5, 1)]
    assert (first.num_tokens, first.num_computed, second.num_tokens, second.num_computed) == (44, 4, 22, 2)


def test_one_pass_alone_has_no_root():
    shared = list(range(100, 120))
    (batch,) = flat_batches([[{"input_ids": [*shared, end], "labels": [-100] * 20 + [end]} for end in (7, 8)]])
    assert batch.root_ids is None and batch.layout.root == 0


def test_the_largest_pass_of_a_step_comes_first_and_nothing_is_lost():
    rows = [{"input_ids": list(range(10 * size, 10 * size + size)), "labels": [-100] * size} for size in (2, 5, 3)]
    batches = flat_batches([[row] for row in rows])
    assert [batch.input_ids[0].tolist() for batch in batches] == [rows[1]["input_ids"], rows[2]["input_ids"], rows[0]["input_ids"]]
