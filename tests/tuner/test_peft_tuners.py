"""What AdaLoRA, BOFT and IA3 do beyond the contract."""

import sys

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.boft import layer as boft

import swift
from swift.errors import ConfigError
from swift.tuner.adalora import distance_from_orthonormal_rows
from swift.tuner.peft_tuners import feedforward_outputs
from tests.tiny import make_model
from tests.tuner.conftest import logits, plain, tune
from tests.tuner.test_contract import ADAPTERS

ADALORA = {"tuner_type": "adalora", "adalora_target_r": 2, "adalora_init_r": 4}


def ranks(model):
    return [int((tensor != 0).sum()) for name, tensor in model.state_dict().items() if ".lora_E." in name]


QUANTIZED = {"dora": {"use_dora": True}} | {kind: ADAPTERS[kind] for kind in ("adalora", "vera", "boft", "fourierft", "ia3")}


@pytest.mark.parametrize(("kind", "bits"), [(kind, bits) for kind in QUANTIZED for bits in (4, 8) if (kind, bits) != ("dora", 8)])
def test_other_adapters_train_on_quantized_weights_and_merge_into_whole_ones(kind, bits, two_layers, tmp_path):
    tuned = tune(two_layers, quant_method="bnb", quant_bits=bits, **QUANTIZED[kind])
    losses = tuned.train(4)
    assert losses[-1] < losses[0]
    path = tuned.save(tmp_path / "checkpoint-4")
    merged = plain(swift.merge_lora(adapters=str(path), model=str(two_layers)))
    wanted = logits(PeftModel.from_pretrained(plain(two_layers), path))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_changes_no_weights_is_not_merged(two_layers, tmp_path):
    model = get_peft_model(plain(two_layers), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.save_pretrained(tmp_path / "prompt", save_embedding_layers=False)
    with pytest.raises(ConfigError, match="PROMPT_TUNING changes no weights to merge into"):
        swift.merge_lora(adapters=str(tmp_path / "prompt"), model=str(two_layers))


@pytest.mark.parametrize(("options", "kind"), [({"tuner_type": "vera", "vera_rank": 4}, "VERA"), ({"lora_rank": 4}, "LORA"), ({}, None)])
def test_get_model_puts_the_tuner_on_that_is_asked_for(options, kind, two_layers):
    model, _ = swift.get_model(str(two_layers), **options)
    found = model.peft_config["default"].peft_type.value if hasattr(model, "peft_config") else None
    assert found == kind


def test_adalora_ends_at_the_ranks_that_were_asked_for(two_layers):
    tuned = tune(two_layers, adalora_tinit=2, adalora_tfinal=3, total_steps=10, **ADALORA)
    tuned.train(2)
    assert sum(ranks(tuned.model)) == 14 * 4  # 2 layers of 7 matrices, before the first distribution
    tuned.train(3)
    assert 14 * 2 < sum(ranks(tuned.model)) < 14 * 4
    tuned.train(5)
    assert sum(ranks(tuned.model)) == 14 * 2
    assert len(set(ranks(tuned.model))) > 1  # some layers have more than others


def test_adalora_keeps_its_factors_orthogonal(two_layers):
    def distance(weight):
        tuned = tune(two_layers, adalora_orth_reg_weight=weight, total_steps=30, learning_rate=1e-2, **ADALORA)
        tuned.train(30)
        return float(distance_from_orthonormal_rows([tensor for name, tensor in tuned.weights().items() if ".lora_A." in name]))

    assert distance(5.0) < 0.7 * distance(0.0)


def test_the_distance_from_orthonormal_rows():
    # M M^T - I is 0 for the first matrix, and diag(3, 0) for the second
    matrices = [torch.eye(2, 3), torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])]
    assert float(distance_from_orthonormal_rows(matrices)) == pytest.approx(1.5)


def test_adalora_has_to_know_the_number_of_steps(two_layers):
    with pytest.raises(ConfigError, match="has to know the number of steps"):
        tune(two_layers, total_steps=None, **ADALORA)
    with pytest.raises(ConfigError, match="5 steps leave none between --adalora_tinit 3 and --adalora_tfinal 2"):
        tune(two_layers, total_steps=5, adalora_tinit=3, adalora_tfinal=2, **ADALORA)


def test_boft_compiles_nothing_without_a_gpu(two_layers, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)  # whoever wants to compile cannot import it
    monkeypatch.setattr(boft, "_FBD_CUDA", None)
    with pytest.raises(ImportError):
        boft.get_fbd_cuda()
    tune(two_layers, tuner_type="boft").train(1)


def test_boft_of_more_factors_needs_a_gpu(two_layers):
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        tune(two_layers, tuner_type="boft", boft_n_butterfly_factor=2)


def test_boft_blocks_that_do_not_divide_a_layer_are_refused(two_layers):
    with pytest.raises(ConfigError, match="--tuner_type boft cannot be put on this model"):
        tune(two_layers, tuner_type="boft", boft_block_size=7)


def test_more_frequencies_than_weights_are_refused(two_layers):
    with pytest.raises(ConfigError, match="--tuner_type fourierft cannot be put on this model"):
        tune(two_layers, tuner_type="fourierft", fourier_n_frequency=5000)


def test_the_feed_forward_layers_are_found_by_structure(tmp_path):
    path = make_model(tmp_path / "square", intermediate_size=32)  # every layer of the feed-forward part is 32 by 32
    assert [name for name in feedforward_outputs(plain(path)) if "self_attn" in name] == []
    wide = make_model(tmp_path / "wide")
    assert feedforward_outputs(plain(wide)) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_ia3_scales_the_input_of_feed_forward_layers_and_the_output_of_others(tmp_path):
    model = tune(make_model(tmp_path / "wide"), tuner_type="ia3").model
    sizes = {name.split(".")[-3]: tuple(parameter.shape) for name, parameter in model.named_parameters() if "ia3_l" in name}
    assert (sizes["down_proj"], sizes["gate_proj"], sizes["k_proj"]) == ((1, 64), (64, 1), (16, 1))


def test_modules_that_are_not_there_are_refused_with_those_that_are(two_layers):
    with pytest.raises(ConfigError, match="cannot be put on this model") as caught:
        tune(two_layers, tuner_type="vera", target_modules=["query"])
    assert "q_proj" in (caught.value.hint or "")
