import numpy as np
import pytest

from swift.data import prefix
from swift.data.prefix import common_prefix, common_root, flatten


@pytest.fixture(autouse=True)
def short_beginnings_count(monkeypatch):
    monkeypatch.setattr(prefix, "MIN_SHARED", 2)


def arrays(*documents):
    return [np.array(document) for document in documents]


def documents_of(flat):
    return [flat.input_ids[place].tolist() for place in flat.places]


def test_common_tokens_are_counted_from_the_beginning():
    a, b, c = arrays([1, 2, 3], [1, 2, 4, 3], [1, 2])
    assert (common_prefix(a, b), common_prefix(a, c), common_prefix(a, a), common_prefix(b, np.array([9]))) == (2, 2, 3, 0)


def test_a_beginning_of_several_documents_stands_there_once():
    flat = flatten(arrays([1, 2, 3, 7], [1, 2, 3, 8, 9], [5, 6]), share=True)
    assert flat.layout.lengths == (3, 1, 2, 2)
    assert flat.layout.parents == (-1, 0, 0, -1)
    assert flat.input_ids.tolist() == [1, 2, 3, 7, 8, 9, 5, 6]
    assert documents_of(flat) == [[1, 2, 3, 7], [1, 2, 3, 8, 9], [5, 6]]


def test_beginnings_branch_more_than_once():
    documents = [[1, 2, 3, 4, 7], [1, 2, 5, 6], [1, 2, 3, 4, 8], [1, 2, 3, 4, 8, 9, 9]]
    flat = flatten(arrays(*documents), share=True)
    assert documents_of(flat) == documents
    assert flat.layout.num_tokens == 2 + 2 + 1 + 4 + 2  # 1 2 | 3 4 | 7 | 8, 8 9 9 | 5 6: one shared token is too few to branch
    assert flat.layout.position_ids()[0, flat.places[3]].tolist() == list(range(7))


def test_equal_documents_and_a_document_that_is_a_beginning_are_placed_on_the_same_tokens():
    documents = [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4], [1, 2]]
    flat = flatten(arrays(*documents), share=True)
    assert documents_of(flat) == documents
    assert flat.layout.num_tokens == 6  # 1 2, then 3, 3 and 3 4: one more shared token is too few to branch again


def test_beginnings_below_the_least_length_are_not_shared():
    flat = flatten(arrays([1, 7], [1, 8]), share=True)
    assert flat.layout.lengths == (2, 2)


def test_nothing_is_shared_when_it_is_not_wanted():
    flat = flatten(arrays([1, 2, 3], [1, 2, 3]), share=False)
    assert flat.layout.parents == (-1, -1)
    assert documents_of(flat) == [[1, 2, 3], [1, 2, 3]]


def test_random_documents_are_always_found_again():
    randomness = np.random.default_rng(0)
    for _ in range(50):
        documents = [randomness.integers(0, 2, randomness.integers(1, 9)) for _ in range(12)]
        flat = flatten(documents, share=True)
        assert documents_of(flat) == [document.tolist() for document in documents]
        assert flat.layout.num_tokens <= sum(map(len, documents))
        for place in flat.places:  # a chain is what its tokens see
            assert np.array_equal(np.flatnonzero(flat.layout.mask()[place[-1]].numpy()), np.sort(place))


@pytest.mark.parametrize(
    ("labels", "root"),
    [
        ([-100, -100, -100, -100, 7], 3),  # 1 2 3 begin all; 4 and 5 differ
        ([-100, -100, -100, 4, 7], 2),  # 3 predicts the 4 that is trained, so it is no part of the root
        ([-100, 2, 3, 4, 7], 0),  # 1 predicts a trained token: nothing is left
    ],
)
def test_a_root_predicts_nothing_that_is_trained(labels, root):
    documents = arrays([1, 2, 3, 4, 7], [1, 2, 3, 5, 9])
    assert common_root(documents, [np.array(labels), np.array([-100] * 4 + [9])]) == root


def test_documents_after_a_root_go_on_from_it():
    flat = flatten(arrays([4, 7], [5, 9, 9]), share=True, root=3)
    assert flat.layout.root == 3
    assert flat.layout.position_ids().tolist() == [[3, 4, 3, 4, 5]]
