"""How LoRA may start: parts of the weights (PiSSA, OLoRA), what quantization has lost (LoftQ), and quantized weights."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig

import swift
from swift.errors import CheckpointError, ConfigError, ModelError
from swift.files import write_json
from swift.model.load import Quantization, load_model
from swift.train.build import tell_unquantized
from tests.tiny import make_model
from tests.tuner.conftest import logits, plain, tune

LOFTQ = {"init_weights": "loftq"}
WAY = "model.layers.1.mlp.down_proj"


def layer(model):
    return model.get_submodule(f"base_model.model.{WAY}")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_model_is_the_same_at_the_first_step(start, two_layers):
    tuned = tune(two_layers, init_weights=start, lora_alpha=8)
    torch.testing.assert_close(logits(tuned.model), logits(plain(two_layers)), rtol=1e-4, atol=1e-5)


def test_pissa_starts_at_the_largest_singular_values(two_layers):
    found = layer(tune(two_layers, init_weights="pissa", lora_rank=4, lora_alpha=8).model)  # scale 8 / 4 = 2
    update = 2 * found.lora_B["default"].weight @ found.lora_A["default"].weight
    U, S, Vh = torch.linalg.svd(plain(two_layers).get_submodule(WAY).weight)
    torch.testing.assert_close(update, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-4, atol=1e-6)


def test_the_saved_adapter_of_pissa_has_twice_the_rank_and_the_same_scale(two_layers, tmp_path):
    path = tune(two_layers, init_weights="pissa", lora_rank=4, lora_alpha=8).save(tmp_path / "checkpoint-0")
    settings = json.loads((path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 16, True)
    assert load_file(path / "adapter_model.safetensors")[f"base_model.model.{WAY}.lora_A.weight"].shape == (8, 64)


def test_pissa_of_embeddings_is_refused(tmp_path):
    untied = make_model(tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match="is for linear layers"):
        tune(untied, init_weights="pissa", target_modules=["embed_tokens", "q_proj"])


def test_loftq_brings_the_4_bit_model_nearer_to_the_whole_one(two_layers):
    quantized = {"quant_method": "bnb", "quant_bits": 4}
    tuned = tune(two_layers, init_weights="loftq", lora_alpha=32, **quantized)
    found = layer(tuned.model)
    lost = (plain(two_layers).get_submodule(WAY).weight - _stored(found)).detach()
    update = 4 * (found.lora_B["default"].weight @ found.lora_A["default"].weight).detach()  # scale 32 / 8
    # Eckart and Young: what is left of the error are its other singular values.
    S = torch.linalg.svdvals(lost)
    assert float(torch.linalg.norm(lost - update)) == pytest.approx(float(S[8:].norm()), rel=1e-3)
    whole = logits(plain(two_layers))
    assert (logits(tuned.model) - whole).norm() < (logits(tune(two_layers, **quantized).model) - whole).norm()


def _stored(layer):
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.get_base_layer().weight
    return dequantize_4bit(weight.data, weight.quant_state)


def test_a_loftq_adapter_is_not_merged_into_whole_weights(two_layers, tmp_path):
    tuned = tune(two_layers, init_weights="loftq", quant_method="bnb", quant_bits=4)
    path = tuned.save(tmp_path / "checkpoint-0")
    write_json(path / "args.json", {"init_weights": "loftq"})
    with pytest.raises(ConfigError, match="cannot be merged into whole ones") as caught:
        swift.merge_lora(adapters=str(path), model=str(two_layers))
    assert "--quant_bits 4" in (caught.value.hint or "")


def test_loftq_without_the_weights_on_disk_is_refused(two_layers):
    from swift.tuner.loftq import start_from_lost_bits

    tuned = tune(two_layers, quant_method="bnb", quant_bits=4)
    tuned.model.get_base_model().config._name_or_path = "/nowhere"
    with pytest.raises(ModelError, match="finds no safetensors"):
        start_from_lost_bits(tuned.model)


@pytest.mark.parametrize(
    "options",
    [{}, {"bnb_4bit_quant_type": "fp4"}, {"quant_bits": 8}, LOFTQ, LOFTQ | {"bnb_4bit_quant_type": "fp4"}],
    ids=str,
)
def test_an_adapter_of_quantized_weights_trains_and_loads_in_plain_peft(options, two_layers, tmp_path):
    options = {"quant_method": "bnb", "quant_bits": 4} | options
    tuned = tune(two_layers, **options)
    before = tuned.weights()
    losses = tuned.train(4)
    assert losses[-1] < losses[0]
    frozen = [name for name, tensor in before.items() if "lora_" not in name and not torch.equal(tensor, tuned.weights()[name])]
    assert frozen == []
    path = tuned.save(tmp_path / "checkpoint-4")
    quantization = Quantization(options["quant_bits"], torch.float32, tuned.config.bnb_4bit_quant_type)
    loaded = PeftModel.from_pretrained(load_model(two_layers, quantization=quantization).model, path)
    assert torch.equal(logits(loaded), logits(tuned.model))


def test_experts_that_stay_whole_are_told(two_layers, tmp_path, capsys):
    sizes = dict(vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for path in (two_layers, tmp_path):
        settings = BitsAndBytesConfig(load_in_4bit=True)
        tell_unquantized(AutoModelForCausalLM.from_pretrained(path, quantization_config=settings, device_map={"": "cpu"}))
    # 98,304 of experts, 512 of the router and 224 of norms of 152,288; of the dense model none but norms.
    told = capsys.readouterr().err
    assert told.count("warning") == 1
    assert "leaves 65% of the weights in float32, such as model.layers.0.mlp.experts.gate_up_proj" in told


@pytest.mark.parametrize("options", [{"bnb_4bit_quant_type": "nf4"}, {"bnb_4bit_quant_type": "fp4"}, {"quant_bits": 8}], ids=str)
def test_an_adapter_of_quantized_weights_is_merged_into_whole_ones(options, two_layers, tmp_path):
    tuned = tune(two_layers, **({"quant_method": "bnb", "quant_bits": 4} | options))
    tuned.train(4)
    path = tuned.save(tmp_path / "checkpoint-4")
    merged = plain(swift.merge_lora(adapters=str(path), model=str(two_layers)))
    wanted = logits(PeftModel.from_pretrained(plain(two_layers), path))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_4_bit_weights_survive_an_evaluation(two_layers):
    options = {"quant_bits": 4, "lora_rank": 4, "init_weights": "gaussian", "lora_dropout": 0}
    ids = torch.arange(4, 36)[None]

    def gradients(is_evaluated):
        torch.manual_seed(0)
        model, _ = swift.get_model(str(two_layers), **options)
        if is_evaluated:
            logits(model)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    before, after = gradients(False), gradients(True)
    assert len(before) == 28  # A and B of 2 layers of 7 matrices
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_damaged_tuner_state_is_refused(two_layers, tmp_path):
    tuned = tune(two_layers, init_weights="pissa")
    path = tuned.save(tmp_path / "checkpoint-0")
    (path / "tuner_state.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tuned.tuner.load(tuned.model, path)
