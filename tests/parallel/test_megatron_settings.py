import pytest
import torch

from swift.errors import ConfigError, ModelError
from swift.parallel.megatron.model import Layout, transformer_config
from swift.parallel.megatron.names import plan
from swift.parallel.megatron.settings import read_settings
from tests.families import build


def settings_of(family, *, tp=1, config=None, **options):
    model = build(family, **options)
    entries = plan(model.state_dict(), num_experts=getattr(model.config, "num_local_experts", 0), is_tied=model.config.tie_word_embeddings)
    return read_settings(model.config.to_dict() | (config or {}), entries, tp=tp)


def test_settings_say_where_they_come_from():
    found = settings_of("qwen2", tp=2)
    assert (found.transformer["num_query_groups"], found.sources["num_query_groups"]) == (2, "num_key_value_heads")
    assert (found.transformer["add_qkv_bias"], found.sources["add_qkv_bias"]) == (True, "tensor q_proj.bias")
    assert (found.model["vocab_size"], found.sources["vocab_size"]) == (128, "vocab_size 128, to a multiple of 128 and 2")


def test_what_the_tensors_show_is_no_matter_of_the_models_name():
    assert settings_of("qwen3").transformer["qk_layernorm"] is True
    assert settings_of("llama").transformer["qk_layernorm"] is False
    assert settings_of("mistral").transformer["window_size"] == (3, 0)  # 4 tokens, with the one that looks


def test_a_router_that_does_not_normalise_takes_its_softmax_first():
    assert settings_of("mixtral").transformer["moe_router_pre_softmax"] is False
    assert settings_of("qwen3_moe", norm_topk_prob=False).transformer["moe_router_pre_softmax"] is True
    assert settings_of("qwen3_moe").transformer["moe_layer_freq"] == 1
    assert settings_of("qwen3_moe", mlp_only_layers=[0]).transformer["moe_layer_freq"] == [0, 1]


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"logits_scaling": 8.0}, "does not compute logits_scaling = 8.0"),
        ("llama", {"hidden_act": "relu2"}, "does not compute hidden_act = relu2"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "does not compute rope_type longrope"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 2}},
            "llama3 with low_freq_factor = 2",
        ),
    ],
)
def test_what_megatron_does_not_compute_is_refused_by_name(family, config, message):
    with pytest.raises(ModelError, match=message):
        settings_of(family, config=config)


def test_a_bias_of_the_output_projection_alone_is_refused():
    with pytest.raises(ModelError, match="a bias of some linear layers only"):
        settings_of("llama", attention_bias=True)


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (Layout(tp=2, pp=2), 6, "needs a multiple of 4 processes, and there are 6"),
        (Layout(tp=4), 4, "--tensor_model_parallel_size 4 does not divide the model's 2 key/value heads"),
        (Layout(pp=2, vpp=2), 2, "x --virtual_pipeline_model_parallel_size 2 does not divide the model's 2 layers"),
        (Layout(ep=2), 2, "--expert_model_parallel_size 2: the model has no experts"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(layout, world_size, message):
    with pytest.raises(ConfigError, match=message):
        layout.check(settings_of("llama"), world_size)


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"attention_dropout": 0.1}, {}, "--sequence_parallel_size 2 cannot be combined with attention_dropout = 0.1"),
        ({}, {"softmax_type": "off-by-one"}, "cannot be combined with softmax_type = off-by-one"),
    ],
)
def test_attention_over_parts_of_a_row_refuses_what_it_has_not(options, extra, message):
    settings = settings_of("llama", **options)
    with pytest.raises(ConfigError, match=message):
        transformer_config(settings, Layout(cp=2), device=torch.device("cpu"), dtype=torch.float32, extra=extra)
