import pytest
import torch
from torch.testing import assert_close

from swift.errors import ModelError
from swift.parallel.megatron.layout import OPERATIONS, Dims, padded_vocabulary
from swift.parallel.megatron.names import STACKED, by_name, global_name, plan, read
from tests.families import build

DIMS = Dims(heads=4, groups=2, head_dim=8, vocab_size=128, padded_vocab_size=136)


def entries_of(model, **options):
    state = model.state_dict()
    experts = getattr(model.config, "num_local_experts", 0)
    return state, plan(state, num_experts=experts, is_tied=model.config.tie_word_embeddings, **options)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("size", [1, 2])
def test_weights_come_back_bit_for_bit(family, size):
    state, entries = entries_of(build(family))
    back = {}
    for entry in entries:
        tensors = [read(state.__getitem__, name) for name in entry.hf]
        shards = [entry.to_mcore(tensors, DIMS, rank=rank, size=size) for rank in range(size)]
        back |= dict(zip(entry.hf, entry.to_hf(shards, DIMS), strict=True))
    tied = {"lm_head.weight"} if "lm_head.weight" not in {name for entry in entries for name in entry.hf} else set()
    assert {STACKED.sub(r"\1", name) for name in back} == set(state) - tied
    assert all(torch.equal(tensor, read(state.__getitem__, name)) for name, tensor in back.items())


def test_a_fused_projection_gives_the_queries_keys_and_values_of_its_parts():
    model = build("qwen2")
    state, entries = entries_of(model)
    attention, states = model.model.layers[0].self_attn, torch.randn(5, 32)
    wanted = [layer(states).unflatten(1, (-1, 8)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    parts = by_name(entries)
    for rank in range(2):
        weight, bias = (
            entry.to_mcore([state[name] for name in entry.hf], DIMS, rank=rank, size=2)
            for entry in (parts[f"decoder.layers.0.self_attention.linear_qkv.{kind}"] for kind in ("weight", "bias"))
        )
        # As Megatron reads it: (tokens, groups of this process, 2 queries + key + value, numbers of a head).
        mixed = (states @ weight.T + bias).view(5, 1, 4, 8)
        query, key, value = mixed.split([2, 1, 1], dim=2)
        assert_close(query.flatten(1, 2), wanted[0][:, 2 * rank : 2 * rank + 2])
        assert_close(key[:, 0], wanted[1][:, rank : rank + 1])
        assert_close(value[:, 0], wanted[2][:, rank : rank + 1])


def test_each_process_has_its_rows_of_gate_and_up():
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    shards = [OPERATIONS["gate_up"].shard(torch.cat([gate, up]), rank, 2).flatten().tolist() for rank in range(2)]
    assert shards == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_the_vocabulary_is_padded_by_zero_rows_to_what_all_processes_divide():
    assert padded_vocabulary(50257, multiple=128, tp=1) == 50304  # GPT-2, as its models are known
    assert padded_vocabulary(50257, multiple=128, tp=8) == 50304  # 8 divides 128
    assert padded_vocabulary(50257, multiple=128, tp=3) == 50304  # 131 * 128 * 3
    assert padded_vocabulary(100, multiple=128, tp=3) == 384
    table = torch.ones(128, 3)
    padded = OPERATIONS["vocabulary"].to_mcore(table, DIMS)
    assert padded.shape == (136, 3)
    assert padded[128:].abs().sum() == 0


def test_a_tied_head_is_no_tensor_of_its_own():
    assert "output_layer.weight" not in by_name(plan(["model.embed_tokens.weight", "lm_head.weight"], is_tied=True))
    assert "output_layer.weight" in by_name(plan(["model.embed_tokens.weight", "lm_head.weight"]))


def test_names_of_a_process_count_from_the_first_layer_and_expert():
    name = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    assert global_name(name, first_layer=4, first_expert=8) == "decoder.layers.5.mlp.experts.local_experts.10.linear_fc1.weight"
    assert global_name("decoder.layers.0.mlp.experts.linear_fc2.weight3", first_layer=0, first_expert=4).endswith("weight7")


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("gemma2", "pre_feedforward_layernorm"),
        ("olmo2", "post_feedforward_layernorm"),
        ("gpt_oss", "sinks"),
    ],
)
def test_a_model_with_a_tensor_that_has_no_place_is_refused_by_its_name(family, tensor):
    with pytest.raises(ModelError, match=rf"no place for the tensor .*{tensor}"):
        entries_of(build(family))


def test_a_checkpoint_that_lacks_a_companion_is_refused():
    with pytest.raises(ModelError, match=r"has model.layers.0.self_attn.q_proj.weight but not model.layers.0.self_attn.k_proj.weight"):
        plan(["model.layers.0.self_attn.q_proj.weight"])
