from swift.train.steps import CPU_TOKENS, Cutting

HALF = CPU_TOKENS // 2


def cutting(**values):
    options = {"units_per_step": 4, "rows_per_batch": 4, "capacity": None, "seed": 0, "shuffle": False, "group_by_length": False}
    return Cutting(**options | {"packing_length": HALF} | values)


def test_packs_that_share_a_beginning_are_counted_as_they_are_computed():
    """Four packs of two rows that are computed in half a pass each, though their rows are longer together."""
    lengths = [HALF - 100] * 8
    packs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert cutting().passes([0, 1, 2, 3], packs, lengths, is_flat=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_row_longer_than_a_pack_counts_whole():
    lengths = [HALF + 100, 10, 10]
    assert cutting().passes([0, 1], [[0], [1, 2]], lengths, is_flat=True) == [[0], [1, 2]]


def test_rows_without_padding_fill_a_pass_on_a_cpu():
    lengths = [HALF, HALF, 10]
    passes = cutting(packing_length=None).passes([0, 1, 2], None, lengths, is_flat=True)
    assert sorted(map(sorted, passes)) == [[0, 1], [2]]
