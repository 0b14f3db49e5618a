"""What every tuner keeps: it trains what it says, and what it saves is what it trained."""

import pytest
import torch
from peft import PeftModel

import swift
from swift.errors import CheckpointError
from swift.tuner import TUNERS
from tests.tuner.conftest import logits, plain, tune

ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora+": {"lorap_lr_ratio": 4.0},
    "neftune": {"neftune_noise_alpha": 5},
    "biases": {"lora_bias": "all"},
    "zero": {"init_weights": "false"},
    "gaussian": {"init_weights": "gaussian"},
    "pissa": {"init_weights": "pissa", "lora_alpha": 8},
    "pissa of few iterations": {"init_weights": "pissa_niter_4", "lora_alpha": 8},
    "pissa, rslora": {"init_weights": "pissa", "use_rslora": True, "lora_alpha": 8},
    "olora": {"init_weights": "olora", "lora_alpha": 8},
    "olora, dora": {"init_weights": "olora", "use_dora": True, "lora_alpha": 8},
    "adalora": {"tuner_type": "adalora", "adalora_target_r": 2, "adalora_init_r": 4, "adalora_tfinal": 2},
    "vera": {"tuner_type": "vera", "vera_rank": 16, "learning_rate": 5e-2},
    "boft": {"tuner_type": "boft"},
    "fourierft": {"tuner_type": "fourierft", "fourier_n_frequency": 200, "fourier_scaling": 30, "learning_rate": 5e-2},
    "ia3": {"tuner_type": "ia3", "learning_rate": 5e-2},
}
WHOLE = {
    "full": {"tuner_type": "full", "learning_rate": 1e-3},
    "lisa": {"tuner_type": "full", "learning_rate": 1e-3, "lisa_activated_layers": 1, "lisa_step_interval": 2},
    "llamapro": {"tuner_type": "llamapro", "llamapro_num_new_blocks": 2},
}
ALL = ADAPTERS | WHOLE
# Their first update is a part of the frozen weights, whose sum rounds otherwise than the weights themselves.
ROUNDS = ("pissa", "pissa of few iterations", "pissa, rslora", "olora", "olora, dora")


def test_every_tuner_is_tried_here():
    assert {options.get("tuner_type", "lora") for options in ALL.values()} == set(TUNERS)


@pytest.mark.parametrize("case", ALL)
def test_training_lowers_the_loss_and_moves_trained_weights_alone(case, two_layers):
    tuned = tune(two_layers, total_steps=20, **ALL[case])
    trained = {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad}
    before = tuned.weights()
    losses = tuned.train(20)
    moved = {name for name, tensor in tuned.weights().items() if not torch.equal(tensor, before[name])}
    assert losses[-1] < losses[0] - 0.03
    assert moved
    assert moved - trained - {"lm_head.weight", "base_model.model.lm_head.weight"} == set()


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_leave_the_weights_of_the_model_alone(case, two_layers):
    tuned = tune(two_layers, **ADAPTERS[case])
    trained = [name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert [name for name in trained if name.endswith("base_layer.weight") or "embed_tokens" in name or name.endswith("norm.weight")] == []


@pytest.mark.parametrize("case", ALL)
def test_what_is_saved_is_loaded_again_bit_for_bit(case, two_layers, tmp_path):
    tuned = tune(two_layers, **ALL[case])
    tuned.train(3)
    path = tuned.save(tmp_path / "checkpoint-3")
    other = tune(two_layers, seed=1 if case in ROUNDS else 2, **ALL[case])
    other.tuner.load(other.model, path)
    assert torch.equal(logits(other.model), logits(tuned.model))


@pytest.mark.parametrize("case", ALL)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case, two_layers, tmp_path):
    whole, part, resumed = (tune(two_layers, **ALL[case]) for _ in range(3))
    whole.train(4)
    part.train(2)
    resumed.load(part.save(tmp_path / "checkpoint-2"), step=2)
    resumed.train(2)
    wanted, found = whole.weights(), resumed.weights()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


@pytest.mark.parametrize("case", ADAPTERS)
def test_plain_peft_computes_the_same_from_a_checkpoint(case, two_layers, tmp_path):
    tuned = tune(two_layers, **ADAPTERS[case])
    tuned.train(3)
    loaded = PeftModel.from_pretrained(plain(two_layers), tuned.save(tmp_path / "checkpoint-3"))
    tolerance = 1e-5 if case in ROUNDS else 0
    torch.testing.assert_close(logits(loaded), logits(tuned.model), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", WHOLE)
def test_plain_transformers_computes_the_same_from_a_checkpoint(case, two_layers, tmp_path):
    tuned = tune(two_layers, **WHOLE[case])
    tuned.train(3)
    assert torch.equal(logits(plain(tuned.save(tmp_path / "checkpoint-3"))), logits(tuned.model))


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_merged_model_is_the_adapter(case, two_layers, tmp_path):
    tuned = tune(two_layers, **ADAPTERS[case])
    tuned.train(6)
    merged = swift.merge_lora(adapters=str(tuned.save(tmp_path / "checkpoint-6")), model=str(two_layers))
    # float32: a merged weight rounds once where the adapter rounds in two products
    torch.testing.assert_close(logits(plain(merged)), logits(tuned.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", WHOLE)
def test_whole_models_need_no_merge_and_say_so(case, two_layers, tmp_path):
    path = tune(two_layers, **WHOLE[case]).save(tmp_path / "checkpoint-0")
    with pytest.raises(CheckpointError, match="holds a whole model") as caught:
        swift.merge_lora(adapters=str(path), model=str(two_layers))
    assert caught.value.hint == f"use it as --model {path}"


@pytest.mark.parametrize("case", ALL)
def test_a_checkpoint_of_another_model_is_refused(case, two_layers, four_layers, tmp_path):
    path = tune(four_layers, **ALL[case]).save(tmp_path / "checkpoint-0")
    other = tune(two_layers, **ALL[case])
    with pytest.raises(CheckpointError, match=r"fit|lacks"):
        other.tuner.load(other.model, path)
