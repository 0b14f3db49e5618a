"""LISA and LLaMA-Pro: full models that are trained in parts."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from swift.config.tuner import TunerConfig
from swift.errors import CheckpointError, ConfigError
from swift.tuner.full import FullTuner
from swift.tuner.lisa import drawn_layers
from swift.tuner.llamapro import LlamaProTuner, places_of_new_layers
from tests.families import build
from tests.tuner.conftest import logits, plain, tune

LISA = {"tuner_type": "full", "learning_rate": 1e-3, "lisa_activated_layers": 1, "lisa_step_interval": 2}


def moved_layers(before, after):
    return {int(name.split(".")[2]) for name in before if ".layers." in name and not torch.equal(before[name], after[name])}


def test_the_drawn_layers_are_a_function_of_seed_and_period():
    draws = [drawn_layers(7, period, count=2, layers=6) for period in range(40)]
    assert draws == [drawn_layers(7, period, count=2, layers=6) for period in range(40)]
    assert draws != [drawn_layers(8, period, count=2, layers=6) for period in range(40)]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert {number for draw in draws for number in draw} == set(range(6))


def test_lisa_moves_the_drawn_layers_and_the_ends_alone(four_layers):
    tuned = tune(four_layers, **LISA)
    for period in range(3):
        before = tuned.weights()
        tuned.train(2)
        after = tuned.weights()
        assert moved_layers(before, after) == set(drawn_layers(1, period, count=1, layers=4))
        assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
        assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_the_optimizer_remembers_the_trained_layers_alone(four_layers):
    tuned = tune(four_layers, **LISA)
    tuned.train(5)
    layer = 9  # weights of one layer: 4 of attention, 3 of feed-forward, 2 norms
    assert len(tuned.strategy.optimizer.state) == layer + 2  # the tied embedding and the last norm


def test_frozen_layers_stay_frozen_when_lisa_draws_them(four_layers):
    tuned = tune(four_layers, freeze_parameters=["model.layers.0", "model.layers.1"], **LISA)
    before = tuned.weights()
    tuned.train(12)
    assert moved_layers(before, tuned.weights()) <= {2, 3}


def test_more_layers_than_there_are_cannot_be_drawn(four_layers):
    with pytest.raises(ConfigError, match="--lisa_activated_layers 9 are more than the model's 4 layers"):
        tune(four_layers, **(LISA | {"lisa_activated_layers": 9}))


@pytest.mark.parametrize(
    ("count", "new", "groups", "expected"),
    [(4, 2, None, [1, 3]), (4, 4, 2, [1, 1, 3, 3]), (6, 2, 1, [5, 5]), (30, 3, None, [9, 19, 29])],
)
def test_new_layers_follow_the_last_of_each_group(count, new, groups, expected):
    assert places_of_new_layers(count, new, groups) == expected


def test_groups_that_do_not_divide_the_layers_are_refused():
    with pytest.raises(ConfigError, match="30 layers cannot be cut into 4 equal groups") as caught:
        places_of_new_layers(30, 4, None)
    assert caught.value.hint == "--llamapro_num_groups can be 1, 2"


def test_the_expanded_model_is_the_old_one_at_first_and_only_new_layers_move(four_layers, tmp_path):
    tuned = tune(four_layers, tuner_type="llamapro", llamapro_num_new_blocks=2)
    assert torch.equal(logits(tuned.model), logits(plain(four_layers)))
    before = tuned.weights()
    tuned.train(3)
    assert moved_layers(before, tuned.weights()) == {2, 5}  # 0 1 new 2 3 new
    path = tuned.save(tmp_path / "checkpoint-3")
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 6


SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99, "pad_token_id": 0}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=64, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=99)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_are_expanded_by_structure(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    tuned = LlamaProTuner().apply(model, TunerConfig(tuner_type="llamapro", llamapro_num_new_blocks=2))
    with torch.no_grad():
        assert torch.equal(tuned(input_ids=ids).logits, before)
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    after = tuned(input_ids=ids, labels=ids).loss
    assert after < loss
    tuned.save_pretrained(tmp_path / name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
    assert again.config.num_hidden_layers == 6
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, tuned(input_ids=ids).logits)
        # the cache of keys and values is counted anew, too
        torch.testing.assert_close(again(input_ids=ids, use_cache=True).logits, tuned(input_ids=ids).logits)


def test_a_model_whose_new_layers_would_change_it_is_refused():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ConfigError, match="new layers would change it"):
        LlamaProTuner().apply(MixtralForCausalLM(config), TunerConfig(tuner_type="llamapro", llamapro_num_new_blocks=2))


def test_weights_whose_files_have_other_names_than_modules_are_read_back(tmp_path):
    saved, model = build("qwen3_moe"), build("qwen3_moe", std=0.01)
    saved.save_pretrained(tmp_path)  # an expert at a time, as on the hub; modules have all experts of a layer in one tensor
    FullTuner().load(model, tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.state_dict().items())
    with pytest.raises(CheckpointError, match="the weights do not fit this model, see model"):
        FullTuner().load(build("mixtral"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it holds an adapter, and not the weights of a model") as caught:
        FullTuner().load(model, tmp_path)
    assert caught.value.hint == "leave --tuner_type away"
