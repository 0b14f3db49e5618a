from swift.data.order import batches, epoch_order


def test_an_epoch_has_every_index_once_in_an_order_of_its_own():
    orders = [epoch_order(50, seed=1, epoch=epoch) for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(50))] * 3
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_order(50, seed=1, epoch=2) == orders[2]
    assert epoch_order(50, seed=2, epoch=2) != orders[2]


def test_without_shuffling_the_order_is_that_of_the_rows():
    assert list(epoch_order(4, seed=1, epoch=3, shuffle=False)) == [0, 1, 2, 3]


def test_the_last_incomplete_batch_is_kept():
    assert batches(5, 2, shuffle=False) == [[0, 1], [2, 3], [4]]
    assert batches(0, 2) == []


def test_grouping_sorts_within_groups_and_starts_with_the_longest():
    # 16 rows, batches of 2: groups of 2 * (16 // 8) = 4 rows, each sorted from long to short.
    lengths = [3, 9, 5, 1, 8, 2, 7, 4, 6, 16, 10, 12, 11, 15, 13, 14]
    made = batches(16, 2, shuffle=False, lengths=lengths, group_by_length=True)
    assert [[lengths[index] for index in batch] for batch in made] == [
        [16, 5], [3, 1], [8, 7], [4, 2], [9, 12], [10, 6], [15, 14], [13, 11],
    ]  # fmt: skip


def test_grouping_keeps_every_row_and_is_seeded():
    lengths = list(range(103))
    made = batches(103, 4, seed=3, epoch=1, lengths=lengths, group_by_length=True)
    assert sorted(index for batch in made for index in batch) == list(range(103))
    assert [len(batch) for batch in made] == [4] * 25 + [3]
    assert made[0][0] == 102
    assert made == batches(103, 4, seed=3, epoch=1, lengths=lengths, group_by_length=True)


def test_batches_are_a_sequence_that_is_made_as_it_is_read():
    made = batches(10**6, 16, shuffle=False)
    assert (len(made), made[-1], made[3:5]) == (62_500, list(range(10**6 - 16, 10**6)), [list(range(48, 64)), list(range(64, 80))])
    assert sum(1 for _ in batches(7, 2, shuffle=False)) == 4
