"""Whole runs with tuners and optimizers other than the usual: they lower the loss, and resume bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from swift.tuner.lisa import drawn_layers
from tests.train.conftest import losses

RUNS = {
    "adalora": {"tuner_type": "adalora", "adalora_target_r": 2, "adalora_init_r": 4},
    "pissa": {"init_weights": "pissa", "lora_alpha": 8},
    "llamapro": {"tuner_type": "llamapro", "llamapro_num_new_blocks": 2},
    "lisa": {"tuner_type": "full", "lisa_activated_layers": 1, "lisa_step_interval": 2},
    "galore": {"tuner_type": "full", "use_galore": True, "galore_rank": 4, "galore_update_proj_gap": 2},
    "muon": {"optimizer": "muon"},
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_lowers_the_loss_and_resumes_bit_for_bit(case, run):
    options = {"save_steps": 3, "max_steps": 6, **RUNS[case]}
    whole, part = run("whole", **options), run("part", **options)
    assert losses(whole)[-1] < losses(whole)[0]
    (part.run / "checkpoint-6").rename(part.run.parent / "lost")
    resumed = run("part", **options, resume_from_checkpoint=str(part.run))
    for file in whole.checkpoint.glob("*.safetensors"):
        wanted, found = load_file(file), load_file(resumed.checkpoint / file.name)
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_a_run_of_adalora_ends_at_its_ranks(run):
    state = load_file(run(max_steps=6, **RUNS["adalora"]).checkpoint / "adapter_model.safetensors")
    assert sum(int((tensor != 0).sum()) for name, tensor in state.items() if "lora_E" in name) == 14 * 2  # 2 layers of 7 matrices


def test_a_run_with_lisa_moves_the_drawn_layer_alone(run, tiny_model):
    result = run(max_steps=2, seed=3, **RUNS["lisa"])
    before, after = load_file(tiny_model / "model.safetensors"), load_file(result.checkpoint / "model.safetensors")
    moved = {int(name.split(".")[2]) for name in before if ".layers." in name and not torch.equal(before[name], after[name])}
    assert moved == set(drawn_layers(3, 0, count=1, layers=2))
