"""Packs in several processes are those of one, whatever each process does of a step."""

import pytest
import torch

from swift.parallel.world import join
from tests.parallel.test_ranks import train
from tests.ranks import run_ranks
from tests.tiny import make_model

pytestmark = pytest.mark.multi
PACKS = {"packing": True, "packing_length": 80, "max_length": 80, "tuner_type": "full", "save_steps": 100, "learning_rate": 1e-3}
SHARED, DEALT = {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 1}
TWO = {
    "ddp": DEALT,
    "fsdp2": DEALT | {"fsdp": "fsdp2"},
    "tensor": SHARED | {"tensor_model_parallel_size": 2},
    "pipeline": SHARED | {"pipeline_model_parallel_size": 2},
    "ulysses": SHARED | {"sequence_parallel_size": 2},
    "ring": SHARED | {"sequence_parallel_size": 2, "sequence_parallel_kind": "ring"},
    "zero2": DEALT | {"deepspeed": "zero2"},
    "zero3": DEALT | {"deepspeed": "zero3"},
    "zero3 x ulysses": SHARED | {"deepspeed": "zero3", "sequence_parallel_size": 2},
    "zero1 x ring": SHARED | {"deepspeed": "zero1", "sequence_parallel_size": 2, "sequence_parallel_kind": "ring"},
}


def _train_all(model, rows, folder):
    with join(torch.device("cpu")):
        return {name: train(model, rows, folder / name, **PACKS, **options)["lines"] for name, options in TWO.items()}


def test_packs_of_two_processes_are_those_of_one(rows, tmp_path):
    model = make_model(tmp_path / "model")
    alone = train(model, rows, tmp_path / "one", **PACKS, **SHARED)["lines"]
    assert len([line for line in alone if "loss" in line]) == 2
    for result in run_ranks(2, _train_all, model, rows, tmp_path):
        for name, lines in result.items():
            for found, wanted in zip(lines, alone, strict=True):
                for key in {"loss", "grad_norm", "eval_loss", "token_acc"} & wanted.keys():
                    assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6), (name, key)
