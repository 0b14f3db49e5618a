"""What one process decides, sees or fails by, the others do too: none waits for ever."""

import json

import pytest
import torch

import swift.train.run
from swift.errors import CheckpointError, MachineError, TrainingError
from swift.parallel.choose import Arrangement
from swift.parallel.mesh import Sizes
from swift.parallel.world import join, read_world
from swift.train.rundir import RunDirectory, check_agreed, check_shared
from tests.parallel.test_ranks import train
from tests.ranks import run_ranks


def _best_step(model, rows, out):
    """Of a run whose processes evaluate to other losses."""
    whole, losses = swift.train.run.evaluate, iter([3.0, 1.0, 2.0, 1.5] if read_world().is_main else [3.0, 4.0, 2.0, 2.0])
    swift.train.run.evaluate = lambda *given, **named: whole(*given, **named) | {"eval_loss": next(losses)}
    try:
        train(model, rows, out, max_steps=4, eval_steps=1, save_steps=4, load_best_model_at_end=True)
    finally:
        swift.train.run.evaluate = whole
    return sorted(path.name for path in out.glob("checkpoint-*"))


def _bad_rows(model, rows, out):
    with pytest.raises(TrainingError, match=r"its rows are in .*bad-step-\d\*?-?.*json"):
        train(
            model,
            rows,
            out,
            max_steps=4,
            learning_rate=1e30,
            tuner_type="full",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            gradient_accumulation_steps=1,
        )


def _together(model, rows, folder):
    best = _best_step(model, rows, folder / "best")
    _bad_rows(model, rows, folder / "bad")
    with join(torch.device("cpu")) as world:
        with pytest.raises(CheckpointError, match="rank 0 goes on from None, and rank 1 from checkpoint-2"):
            check_agreed(world, folder / "checkpoint-2" if world.rank else None)
        check_agreed(world, folder / str(world.rank) / "checkpoint-2")
        apart, said = RunDirectory(folder / str(world.rank), owns=world.is_main), "is not on a disk that all processes see"
        with apart, pytest.raises(MachineError, match=said):
            check_shared(apart, world, torch.device("cpu"), patience_s=0)
        with RunDirectory(folder / "shared", owns=world.is_main) as shared:
            check_shared(shared, world, torch.device("cpu"))
    return best


@pytest.mark.multi
def test_processes_agree(tiny_model, rows, tmp_path):
    saved = ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert run_ranks(2, _together, tiny_model, rows, tmp_path, deadline_s=100) == [saved, saved]
    bad = [json.loads(file.read_text())["rows"] for file in sorted((tmp_path / "bad").glob("bad-step-*-*.json"))]
    assert [len(rows) for rows in bad] == [2, 2] and bad[0] != bad[1]


def test_one_process_writes_for_those_that_see_the_same_rows():
    found = Arrangement("ddp", Sizes(pp=2, dp=2, cp=2, tp=2))
    assert [found.named_reader(rank) for rank in range(16)] == ["-0", None, None, None, "-1", *[None] * 11]
    assert [Arrangement("ddp", Sizes(tp=2)).named_reader(rank) for rank in range(2)] == ["", None]
