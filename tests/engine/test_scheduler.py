"""What a pass computes: budget, order, shared beginnings, copies, preemption, guesses."""

import random

from swift.engine.native.blocks import Blocks
from swift.engine.native.scheduler import Copy, Scheduler, Sequence


def make(num_blocks=16, block_size=4, *, max_num_seqs=4, max_num_tokens=8, **options):
    return Scheduler(Blocks(num_blocks, block_size), max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens, **options)


def run(scheduler, step, token=7):
    """The pass is computed and each last part gives ``token``."""
    scheduler.computed(step, [[token] if part.is_last else [] for part in step.parts])


def spans(step):
    return [(part.sequence.id, part.begin, part.end, part.is_last) for part in step.parts]


def test_a_long_prompt_is_computed_in_parts():
    scheduler = make()
    scheduler.add(Sequence("a", list(range(20))))
    seen = []
    for _ in range(4):
        step = scheduler.plan()
        seen += spans(step)
        run(scheduler, step)
    assert seen == [("a", 0, 8, False), ("a", 8, 16, False), ("a", 16, 20, True), ("a", 20, 21, True)]


def test_answers_come_before_prompts_and_new_sequences_fill_the_pass():
    scheduler = make()
    scheduler.add(Sequence("long", list(range(20))))
    run(scheduler, scheduler.plan())
    scheduler.add(Sequence("short", [1, 2]))
    assert spans(scheduler.plan()) == [("long", 8, 16, False)]
    scheduler = make(max_num_tokens=9)
    scheduler.add(Sequence("short", [1, 2]))
    run(scheduler, scheduler.plan())
    scheduler.add(Sequence("long", list(range(20))))
    scheduler.add(Sequence("later", [3, 4]))
    assert spans(scheduler.plan()) == [("short", 2, 3, True), ("long", 0, 8, False)]


def test_no_more_sequences_than_allowed_run():
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add(Sequence(name, [1]))
    assert [part.sequence.id for part in scheduler.plan().parts] == ["a", "b"]


def test_a_prompt_that_begins_like_a_computed_one_skips_what_is_known():
    scheduler = make()
    scheduler.add(Sequence("first", list(range(8))))
    run(scheduler, scheduler.plan())
    scheduler.add(Sequence("second", [*range(6), 50, 51]))
    step = scheduler.plan()
    first, second = scheduler.running
    assert spans(step)[1] == ("second", 6, 8, True)
    assert second.blocks[0] == first.blocks[0]
    assert step.copies == [Copy(first.blocks[1], second.blocks[1], 2)]
    assert second.num_cached == 6


def test_of_prompts_that_begin_alike_one_is_computed_and_the_others_wait_for_it():
    scheduler = make(max_num_tokens=16)
    for name in "abc":
        scheduler.add(Sequence(name, [*range(6), ord(name)]))
    scheduler.add(Sequence("other", [90, 91]))
    step = scheduler.plan()
    assert spans(step) == [("a", 0, 7, True), ("other", 0, 2, True)]
    run(scheduler, step)
    # Of six tokens one block of four is full.
    assert spans(scheduler.plan())[2:] == [("b", 4, 7, True), ("c", 4, 7, True)]


def test_a_prompt_whose_logits_are_wanted_is_computed_whole():
    scheduler = make(max_num_tokens=16)
    scheduler.add(Sequence("first", list(range(7))))
    run(scheduler, scheduler.plan())
    scheduler.add(Sequence("second", list(range(7)), reads_cache=False))
    assert spans(scheduler.plan())[1] == ("second", 0, 7, True)


def test_without_sharing_everything_is_computed():
    scheduler = make(shares_prefixes=False)
    scheduler.add(Sequence("first", list(range(8))))
    run(scheduler, scheduler.plan())
    scheduler.add(Sequence("second", list(range(7))))
    assert spans(scheduler.plan())[1] == ("second", 0, 7, True)


def test_who_came_last_gives_up_blocks_and_finds_them_again():
    scheduler = make(num_blocks=4, max_num_tokens=16)
    first, second = Sequence("first", list(range(7))), Sequence("second", list(range(100, 107)))
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(2):
        run(scheduler, scheduler.plan())
    step = scheduler.plan()  # both need a third block
    assert spans(step) == [("first", 8, 9, True)]
    assert scheduler.num_preemptions == 1
    assert list(scheduler.waiting) == [second] and second.blocks == [] and second.num_computed == 0
    run(scheduler, step)
    scheduler.remove(first)
    assert spans(scheduler.plan()) == [("second", 4, 9, True)]  # its first block was still there


def test_a_sequence_that_needs_all_blocks_is_begun_though_a_copy_would_need_one_more():
    scheduler = make(num_blocks=2, max_num_tokens=8)
    scheduler.add(Sequence("first", list(range(8))))
    run(scheduler, scheduler.plan())
    scheduler.remove(scheduler.running[0])
    second = Sequence("second", [*range(6), 50, 51])
    assert scheduler.fits(8)
    scheduler.add(second)
    step = scheduler.plan()
    assert spans(step) == [("second", 4, 8, True)]
    assert step.copies == []


def test_right_guesses_are_computed_and_wrong_ones_forgotten():
    scheduler = make()
    sequence = Sequence("a", [1, 2, 3])
    scheduler.add(sequence)
    run(scheduler, scheduler.plan())
    sequence.draft = [8, 9, 10]
    step = scheduler.plan()
    assert (step.parts[0].begin, step.parts[0].end, step.parts[0].num_draft) == (3, 4, 3)
    scheduler.computed(step, [[8, 5]])  # 8 was right, 5 in place of 9
    assert sequence.tokens == [1, 2, 3, 7, 8, 5]
    assert sequence.num_computed == 5
    assert sequence.draft == []


def test_any_load_ends_with_every_sequence_answered_and_all_blocks_free():
    draw = random.Random(1)
    for seed in range(20):
        scheduler = make(num_blocks=12, block_size=3, max_num_seqs=5, max_num_tokens=7)
        missing = {str(number): draw.randint(1, 12) for number in range(25)}
        for name in missing:
            scheduler.add(Sequence(name, [draw.randrange(3) for _ in range(draw.randint(1, 24))]))
        for _ in range(2000):
            if scheduler.is_idle:
                break
            step = scheduler.plan()
            assert step.parts, seed
            assert sum(part.num_tokens for part in step.parts) <= 7
            for part in step.parts:
                assert len(part.sequence.blocks) * 3 >= part.end + part.num_draft
            scheduler.computed(step, [[draw.randrange(3)] if part.is_last else [] for part in step.parts])
            for part in step.parts:
                if part.is_last:
                    missing[part.sequence.id] -= 1
                    if missing[part.sequence.id] == 0:
                        scheduler.remove(part.sequence)
                    elif draw.random() < 0.3:
                        part.sequence.draft = [draw.randrange(3)]
        assert scheduler.is_idle
        assert scheduler.blocks.num_free == 12
