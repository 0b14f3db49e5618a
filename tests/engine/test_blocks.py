"""Blocks of the KV cache: shared beginnings, copies, what is forgotten first."""

import random

import pytest

from swift.engine.native.blocks import Blocks, Found, digest


def filled(blocks, tokens, salt=b""):
    """The blocks of a sequence of ``tokens`` that was computed; full ones are sealed."""
    size = blocks.block_size
    taken = blocks.take(-(-len(tokens) // size))
    before = salt
    for index in range(len(tokens) // size):
        before, taken[index] = blocks.seal(taken[index], before, tokens[index * size : (index + 1) * size])
    return taken


def test_a_sequence_that_begins_alike_finds_full_blocks_and_a_block_to_copy_from():
    blocks = Blocks(8, 4)
    taken = filled(blocks, [*range(8), 20, 21, 22, 23])
    found = blocks.find([*range(8), 20, 21, 99, 98, 97])
    assert found.blocks == tuple(taken[:2])
    assert (found.source, found.num_copied) == (taken[2], 2)


def test_the_last_token_is_never_taken_from_the_cache():
    blocks = Blocks(8, 4)
    taken = filled(blocks, list(range(8)))
    found = blocks.find(list(range(8)))
    assert found.blocks == (taken[0],)
    assert (found.source, found.num_copied) == (taken[1], 3)
    assert blocks.find([0]) == Found()


def test_the_same_tokens_after_others_are_not_found():
    blocks = Blocks(8, 4)
    filled(blocks, list(range(8)))
    assert blocks.find([4, 5, 6, 7, 8]) == Found()


def test_another_salt_finds_nothing():
    blocks = Blocks(8, 4)
    filled(blocks, list(range(8)), salt=b"one")
    assert blocks.find(list(range(9)), b"two") == Found()
    assert len(blocks.find(list(range(9)), b"one").blocks) == 2


def test_released_blocks_are_found_until_their_space_is_needed_and_ends_go_first():
    blocks = Blocks(4, 2)
    taken = filled(blocks, [1, 2, 3, 4, 5, 6])
    blocks.release(taken)
    assert blocks.num_free == 4
    assert len(blocks.find([1, 2, 3, 4, 5, 6, 7]).blocks) == 3
    blocks.take(2)  # one was empty, the other held 5, 6
    assert len(blocks.find([1, 2, 3, 4, 5, 6, 7]).blocks) == 2


def test_take_gives_all_or_none():
    blocks = Blocks(3, 2)
    assert blocks.take(4) is None
    assert blocks.num_free == 3
    assert sorted(blocks.take(3)) == [0, 1, 2]


def test_blocks_with_the_same_content_become_one():
    blocks = Blocks(4, 2)
    first, second = filled(blocks, [1, 2]), filled(blocks, [1, 2])
    assert first == second
    assert blocks.num_free == 3
    blocks.release(first)
    assert blocks.num_free == 3
    blocks.release(second)
    assert blocks.num_free == 4


def test_a_block_that_is_released_too_often_is_a_mistake():
    blocks = Blocks(1, 2)
    taken = blocks.take(1)
    blocks.release(taken)
    with pytest.raises(AssertionError, match="more often"):
        blocks.release(taken)


def test_a_digest_depends_on_tokens_and_on_what_came_before():
    names = {digest(b"", [1, 2]), digest(b"", [2, 1]), digest(b"a", [1, 2]), digest(digest(b"", [1, 2]), [1, 2])}
    assert len(names) == 4


def test_any_order_of_use_keeps_account():
    draw = random.Random(0)
    blocks = Blocks(16, 2)
    living: list[list[int]] = []
    for _ in range(3000):
        if living and draw.random() < 0.5:
            blocks.release(living.pop(draw.randrange(len(living))))
            continue
        tokens = [draw.randrange(2) for _ in range(draw.randint(1, 9))]
        found = blocks.find(tokens)
        blocks.hold(found.blocks)
        taken = blocks.take(-(-len(tokens) // 2) - len(found.blocks))
        if taken is None:
            blocks.release(found.blocks)
            continue
        mine = [*found.blocks, *taken]
        before = found.digests[-1] if found.digests else b""
        for index in range(len(found.blocks), len(tokens) // 2):
            before, mine[index] = blocks.seal(mine[index], before, tokens[2 * index : 2 * index + 2])
        living.append(mine)
        assert blocks.num_free == 16 - len({block for held in living for block in held})
    for held in living:
        blocks.release(held)
    assert blocks.num_free == 16
