import numpy as np
import pytest
import torch

from swift.data.collate import collate, collate_pairs
from swift.errors import ConfigError

SHORT = {"input_ids": np.array([1, 2]), "labels": np.array([-100, 2]), "weights": None}
LONG = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "weights": None}


def test_rows_are_padded_to_the_longest():
    batch = collate([SHORT, LONG], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100, 4, 5]]
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)


def test_rows_can_be_padded_on_the_left():
    batch = collate([SHORT, LONG], pad_token_id=9, padding_side="left")
    assert batch["input_ids"].tolist() == [[9, 1, 2], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 2], [-100, 4, 5]]
    with pytest.raises(ConfigError):
        collate([SHORT], pad_token_id=9, padding_side="top")


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (2, 4), (3, 3), (8, 8)])
def test_the_width_can_be_a_multiple(multiple, width):
    assert collate([SHORT, LONG], pad_token_id=9, pad_to_multiple_of=multiple)["labels"].shape == (2, width)


def test_weights_are_there_if_one_row_has_them():
    batch = collate([SHORT, {**LONG, "weights": [0.0, 2.0, 0.5]}], pad_token_id=9)
    torch.testing.assert_close(batch["weights"], torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.5]]))


def test_a_pad_token_inside_a_row_is_attended_to():
    assert collate([{**SHORT, "input_ids": [9, 2]}], pad_token_id=9)["attention_mask"].tolist() == [[1, 1]]


def test_labels_of_rows_become_a_tensor():
    assert collate([{**SHORT, "label": True}, {**LONG, "label": False}], pad_token_id=9)["label"].tolist() == [True, False]
    assert "label" not in collate([{**SHORT, "label": 1}, LONG], pad_token_id=9)


def test_pairs_are_all_chosen_rows_and_then_all_rejected_ones():
    pairs = [{"chosen": SHORT, "rejected": LONG, "margin": 1}, {"chosen": LONG, "rejected": SHORT, "margin": 0.5}]
    batch = collate_pairs(pairs, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5], [3, 4, 5], [1, 2, 9]]
    assert batch["margin"].tolist() == [1.0, 0.5]
