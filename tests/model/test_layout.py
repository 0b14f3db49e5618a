import torch

from swift.model.layout import Layout

# tokens 0 1 2 are shared; 3 4 continue them; 5 6 7 continue them too; 8 9 are a document of their own
TREE = Layout(lengths=(3, 2, 3, 2), parents=(-1, 0, 0, -1))


def test_positions_go_on_after_a_shared_beginning():
    assert TREE.position_ids().tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]


def test_a_token_sees_its_own_document_up_to_itself():
    seen = [row.nonzero().flatten().tolist() for row in TREE.mask()]
    assert seen[:5] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert seen[5:] == [[0, 1, 2, 5], [0, 1, 2, 5, 6], [0, 1, 2, 5, 6, 7], [8], [8, 9]]


def test_kernels_for_unequal_lengths_get_the_keys_of_each_chain():
    index, ends_q, ends_k, most_q, most_k = TREE.varlen
    assert index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert ends_q.tolist() == [0, 3, 5, 8, 10]
    assert ends_k.tolist() == [0, 3, 8, 14, 16]
    assert (most_q, most_k) == (3, 6)
    assert ends_q.dtype == ends_k.dtype == torch.int32


def test_documents_that_share_nothing_are_one_segment_each():
    layout = Layout.of_documents([2, 1])
    assert layout.chains == ((0,), (1,))
    assert layout.position_ids().tolist() == [[0, 1, 0]]


def test_a_root_stands_before_all_documents():
    layout = Layout(lengths=(1, 1, 2), parents=(-1, 0, -1), root=2)
    assert layout.position_ids().tolist() == [[2, 3, 2, 3]]
    assert [row.nonzero().flatten().tolist() for row in layout.mask()] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5]]
    index, _, ends_k, _, most_k = layout.varlen
    assert index.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 4, 5]
    assert ends_k.tolist() == [0, 3, 7, 11]
    assert most_k == 4


def test_a_shared_token_is_in_the_longest_of_its_documents():
    assert TREE.document_lengths().tolist() == [6, 6, 6, 5, 5, 6, 6, 6, 2, 2]
