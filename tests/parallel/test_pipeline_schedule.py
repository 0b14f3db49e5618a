"""Schedules and partitions of a pipeline: known tables, known lengths, and none that waits for itself."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from swift.errors import ConfigError
from swift.parallel.pipeline.costs import in_blocks
from swift.parallel.pipeline.partition import partition
from swift.parallel.pipeline.schedule import forward_only, gpipe, idle_share, in_time, one_forward_one_backward


def _rows(table):
    return [" ".join(str(action or "...") for action in row) for row in table]


def test_gpipe_fills_and_drains():
    assert _rows(in_time(gpipe(2, 1, 3), 2)) == [
        "0F0 0F1 0F2 ... ... 0B0 0B1 0B2",
        "... 1F0 1F1 1F2 1B0 1B1 1B2 ...",
    ]


def test_1f1b_is_the_table_of_its_paper():
    """Narayanan et al. 2021 (arXiv:2104.04473), figure 3 at the top, with four processes and a backward pass of one step."""
    assert _rows(in_time(one_forward_one_backward(4, 1, 4), 4)) == [
        "0F0 0F1 0F2 0F3 ... ... ... 0B0 ... 0B1 ... 0B2 ... 0B3",
        "... 1F0 1F1 1F2 ... ... 1B0 1F3 1B1 ... 1B2 ... 1B3 ...",
        "... ... 2F0 2F1 ... 2B0 2F2 2B1 2F3 2B2 ... 2B3 ... ...",
        "... ... ... 3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 ... ... ...",
    ]


@pytest.mark.parametrize(("processes", "virtual"), [(2, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_interleaved_order_is_that_of_torch(processes, virtual, rounds):
    batches = processes * rounds
    sizes = {"n_local_stages": virtual, "microbatches_per_round": processes, "pp_group_size": processes, "_n_microbatches": batches}
    for rank, order in enumerate(one_forward_one_backward(processes, virtual, batches)):
        theirs = ScheduleInterleaved1F1B._calculate_single_rank_operations(SimpleNamespace(**sizes), rank)
        assert [str(action) for action in order] == [str(action) for action in theirs if action is not None]


def test_no_schedule_waits_for_itself_and_each_pass_comes_once():
    for processes in range(2, 7):
        for virtual in range(1, 4):
            for batches in range(1, 14):
                for make, passes in ((gpipe, 2), (one_forward_one_backward, 2), (forward_only, 1)):
                    table = in_time(make(processes, virtual, batches), processes * virtual)
                    done = [action for row in table for action in row if action]
                    assert len(done) == len(set(done)) == passes * processes * virtual * batches


@pytest.mark.parametrize(("processes", "virtual", "batches"), [(2, 1, 2), (4, 1, 8), (2, 2, 4), (4, 2, 8), (8, 4, 16)])
def test_the_idle_time_is_that_of_the_formula(processes, virtual, batches):
    table = in_time(one_forward_one_backward(processes, virtual, batches), processes * virtual)
    length = len(table[0])
    assert length == 2 * (virtual * batches + processes - 1)
    assert all(row.count(None) == pytest.approx(idle_share(processes, virtual, batches) * length) for row in table)


def test_1f1b_keeps_no_more_micro_batches_than_there_are_stages_ahead():
    for rank, order in enumerate(one_forward_one_backward(4, 1, 12)):
        alive, most = 0, 0
        for action in order:
            alive += 1 if action.is_forward else -1
            most = max(most, alive)
        assert most == 4 - rank


def test_an_order_that_waits_for_itself_is_told():
    orders = gpipe(2, 1, 2)
    orders[1].reverse()
    with pytest.raises(ConfigError, match="waits for itself after 2 of 8 passes"):
        in_time(orders, 2)


@pytest.mark.parametrize(
    ("blocks", "stages", "first", "last", "wanted"),
    [
        ([1] * 8, 4, 0, 0, [2, 2, 2, 2]),
        ([1] * 7, 3, 0, 0, [2, 2, 3]),
        ([1] * 8, 4, 0, 1.5, [2, 2, 3, 1]),  # a head as long as 1.5 blocks: 2, 2, 3, 2.5 at most, where even stages have 3.5
        ([1] * 8, 4, 2, 2, [1, 3, 3, 1]),
        ([3, 1, 1, 1], 2, 0, 0, [1, 3]),
        ([1, 1], 2, 0, 9, [1, 1]),
    ],
)
def test_the_costliest_stage_costs_least(blocks, stages, first, last, wanted):
    assert [len(run) for run in partition(blocks, stages, first=first, last=last)] == wanted


def test_runs_of_blocks_adjoin():
    runs = partition([1.0] * 11, 4, last=2.0)
    assert [at for run in runs for at in run] == list(range(11))


def test_more_stages_than_blocks_are_told():
    with pytest.raises(ConfigError, match="4 pipeline stages are more than the 2 blocks of this model"):
        partition([1, 1], 4)


def test_measured_times_become_parts_of_a_block():
    costs = in_blocks([0.0101, 0.0100, 0.0199], 0.0004, 0.0240)
    assert (costs.blocks, costs.first, costs.last) == ([1.0, 1.0, 2.0], 0.0, 2.5)
