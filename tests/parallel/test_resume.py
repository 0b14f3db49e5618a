"""A run goes on in any other arrangement of its processes, as if it had always been in one process."""

import shutil

import pytest
import torch
from torch import nn

from swift.errors import CheckpointError
from swift.parallel import state as states
from swift.parallel.world import World, join
from tests.parallel.test_ranks import differs, train, weights
from tests.ranks import run_ranks
from tests.tiny import make_model

ALONE = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "pipeline_schedule": "1f1b"}
ALONE |= {"virtual_pipeline_model_parallel_size": 1, "gradient_accumulation_steps": 1}
STAGES = ALONE | {"pipeline_model_parallel_size": 2, "gradient_accumulation_steps": 2}
GATHERED = ALONE | {"fsdp": "fsdp2", "fsdp_reshard_after_forward": False}  # weights are whole after an evaluation
CHAIN = [
    ALONE,
    STAGES,
    STAGES | {"pipeline_schedule": "interleaved", "virtual_pipeline_model_parallel_size": 2},
    GATHERED,
    ALONE | {"tensor_model_parallel_size": 2, "gradient_accumulation_steps": 2},
]


def _go_on(model, rows, folder, common):
    """Each arrangement takes one step more than the one before, and then goes on to the end."""
    for number, options in enumerate(CHAIN):
        out = folder / str(number)
        if number:
            with join(torch.device("cpu")) as world:
                if world.is_main:
                    shutil.copytree(folder / str(number - 1), out)
                    for step in range(number + 1, len(CHAIN) + 1):
                        shutil.rmtree(out / f"checkpoint-{step}")
                world.barrier()
            options = options | {"resume_from_checkpoint": str(out)}
        train(model, rows, out, **common, **options)


@pytest.mark.multi
def test_a_run_goes_on_in_other_stages_parts_and_layers(rows, tmp_path):
    common = {"tuner_type": "full", "max_steps": len(CHAIN), "save_steps": 1, "learning_rate": 1e-3}
    model = make_model(tmp_path / "model", num_hidden_layers=4)  # embedding and head are one weight, in two stages
    train(model, rows, tmp_path / "one", gradient_accumulation_steps=2, **common)
    run_ranks(2, _go_on, model, rows, tmp_path, common)
    wanted = weights(tmp_path / "one", len(CHAIN))
    for number in range(len(CHAIN)):
        assert differs(weights(tmp_path / str(number), len(CHAIN)), wanted) < 1e-4, CHAIN[number]


def _optimizer(model, groups):
    return torch.optim.AdamW([{"params": [getattr(model, name) for name in names], "weight_decay": decay} for names, decay in groups])


def test_states_and_settings_find_their_parameters_in_other_groups(tmp_path):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    saved = _optimizer(first, [(["weight"], 0.5), (["bias"], 0.0)])
    (first.weight.sum() + 2 * first.bias.sum()).backward()
    saved.step()
    for group in saved.param_groups:
        group["lr"] *= 0.1 + group["weight_decay"]
        group["initial_lr"] = 1e-3
    states.save(tmp_path / "optimizer.pt", states.names_of(first), saved, World(), is_sharded=False)
    found = _optimizer(second, [(["bias"], 0.0), (["weight"], 0.5)])
    states.load(tmp_path / "optimizer.pt", states.names_of(second), found, World())
    assert [group["lr"] for group in found.param_groups] == pytest.approx([1e-4, 6e-4])
    for name in ("weight", "bias"):
        own, there = found.state[getattr(second, name)], saved.state[getattr(first, name)]
        assert own.keys() == there.keys() and all(torch.equal(own[key], there[key]) for key in own)
    with pytest.raises(CheckpointError, match="it is of a parameter that is not trained here: bias"):
        states.load(tmp_path / "optimizer.pt", states.names_of(second), _optimizer(second, [(["weight"], 0.5)]), World())


def test_a_checkpoint_gets_its_name_when_its_parts_are_written(run, tmp_path, monkeypatch):
    seen, save = [], states.save

    class Written:
        """What is still being written until somebody waits for it."""

        def done(self):
            return False

        def result(self):
            seen.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")))

    monkeypatch.setattr(states, "save", lambda *given, **named: (save(*given, **named), Written())[1])
    result = run(max_steps=2, save_steps=1)
    assert seen == [[], ["checkpoint-1"]] and result.checkpoint.name == "checkpoint-2" and result.checkpoint.is_dir()
