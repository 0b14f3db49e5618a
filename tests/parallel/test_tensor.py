"""Layers shared by processes: what they compute together is what one process computes, and each holds its share alone."""

import copy
import functools
from unittest import mock

import peft
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from swift.data.collate import flat_batch, padded_batch
from swift.errors import ConfigError
from swift.model.policy import Policy, packing_fault
from swift.parallel.gradients import scale, total_norm
from swift.parallel.mesh import Mesh, sizes_of
from swift.parallel.tensor import fill, split_layers, whole
from swift.parallel.tensor.plan import read_plan
from swift.parallel.world import join
from swift.train.activations import checkpoint_activations
from swift.tuner.adapter import save_adapter
from swift.tuner.blocks import blocks_of
from swift.tuner.fused import fuse
from tests.families import EXPERTS, build
from tests.model.test_policy import examples
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LINEAR = "all-linear"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make(family, lora=None, **options):
    """A random model with packed attention; its adapter, if any, is one that has learned something."""
    model = build(family, **options)
    assert packing_fault(model) is None
    if lora is not None:
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **lora))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def batches():
    """A padded one and a packed one. Token 64 is the first of the second half of the vocabulary, 0 is what pads."""
    rows = examples()
    rows[2]["input_ids"][1:3] = [64, 0]
    return [padded_batch(rows, pad_token_id=0), flat_batch(rows, share=True)]


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    return {name: full(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found, wanted, found_gradients, wanted_gradients):
    """The loss to 1e-5, gradients to 1e-5 of the largest value of each (and 1e-7 of the model's largest, for those that are rounding)."""
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-5)
    assert found_gradients.keys() == wanted_gradients.keys()
    rounding = 1e-7 * max(float(gradient.abs().max()) for gradient in wanted_gradients.values())
    for name, gradient in wanted_gradients.items():
        atol = 1e-5 * float(gradient.abs().max()) + rounding
        torch.testing.assert_close(
            found_gradients[name].reshape(gradient.shape), gradient, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def shares(model):
    """{name: share of its numbers that is in this process}, and that no more memory is held than those need."""
    found = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local()
        assert local.untyped_storage().nbytes() <= local.numel() * local.element_size(), name
        found[name] = local.numel() / parameter.numel()
    return found


def assert_same_norm(one, shared):
    """And both models have their gradients clipped to a norm of 1."""
    own = [parameter.grad for parameter in shared.parameters() if parameter.grad is not None]
    norm = total_norm(own, CPU)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)), rel=1e-5)
    scale(own, min(1.0, 1.0 / (norm + 1e-6)))


def compute_the_same(cases):
    with join(CPU) as world:
        mesh = Mesh(sizes_of(world.size, tp=world.size), "cpu")
        found = []
        for family, lora, options in cases:
            one, shared = make(family, lora, **options), make(family, lora, **options)
            split_layers(shared, mesh["tp"])
            policies = Policy(one), Policy(shared)
            for batch in batches():
                results = []
                for policy in policies:
                    policy.model.zero_grad()
                    loss, right = policy.cross_entropy(batch)
                    loss.backward()
                    results.append((loss.detach(), right))
                assert results[0][1] == results[1][1]
                assert_same(results[1][0], results[0][0], gradients(shared), gradients(one))
                states = torch.randn(3, policies[0].inner.get_input_embeddings().weight.shape[1])
                torch.testing.assert_close(policies[1].logits_of(states), policies[0].logits_of(states), atol=1e-4, rtol=1e-4)
            assert_same_norm(one, shared)
            found.append((shares(shared), policies[1].part is not None))
        return found


@pytest.mark.parametrize(
    "cases",
    [
        [("llama", None, {}), ("llama", {"target_modules": LINEAR}, {"tie_word_embeddings": True})],
        [
            ("qwen3", None, {"tie_word_embeddings": True}),
            ("qwen3", {"target_modules": ATTENTION, "lora_bias": True}, {"attention_bias": True}),
        ],
        [("gemma3_text", None, {}), ("gemma3_text", {"target_modules": LINEAR}, {}), ("gemma2", None, {})],
        [("phi3", None, {}), ("phi3", {"target_modules": LINEAR}, {})],
        [("qwen3_moe", None, {}), ("qwen3_moe", {"target_modules": ATTENTION}, {})],
        [
            ("llama", {"target_modules": [*ATTENTION, "lm_head"]}, {}),
            ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, {}),
        ],
    ],
    ids=lambda cases: " ".join(dict.fromkeys(case[0] for case in cases)),
)
def test_two_processes_compute_what_one_does(cases):
    for held in run_ranks(2, compute_the_same, cases):
        for (share, has_part), (family, _, _) in zip(held, cases, strict=True):
            assert has_part
            assert {value for name, value in share.items() if "layers" in name and "norm" not in name and "lora_" not in name} <= {0.5, 1.0}
            split = [name for name, value in share.items() if value == 0.5]
            assert any("embed" in name for name in split) and sum("layers.0" in name for name in split) >= 4, family


LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
MANY = [
    *((family, None, {}) for family in ("mistral", "olmo2", "cohere", "cohere2", "granite", "gpt_neox", "gpt_oss", "glm4", "starcoder2")),
    *((family, {"target_modules": LINEAR}, {}) for family in ("mistral", "olmo2", "cohere", "granite", "gpt_neox", "gemma2")),
    ("qwen2_moe", None, {**EXPERTS, "shared_expert_intermediate_size": 32}),
    ("deepseek_v3", None, LATENT),
    ("deepseek_v3", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}, LATENT),
]


@pytest.mark.slow
def test_many_families_are_computed_by_two_processes_as_by_one():
    for held in run_ranks(2, compute_the_same, MANY):
        assert len(held) == len(MANY) and all(has_part and 0.5 in share.values() for share, has_part in held)


def test_four_processes_share_a_vocabulary_that_does_not_divide():
    options = {"num_key_value_heads": 4, "vocab_size": 131, "tie_word_embeddings": True}
    cases = [("qwen3", None, options), ("qwen3", {"target_modules": LINEAR}, options)]
    held = run_ranks(4, compute_the_same, cases)
    assert [share[0][0]["model.embed_tokens.weight"] for share in held] == [33 / 131, 33 / 131, 33 / 131, 32 / 131]
    names = [name for name in held[0][0][0] if "proj" in name]
    assert len(names) == 14 and {share[0][0][name] for share in held for name in names} == {0.25}
    factors = held[0][1][0]
    assert factors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] == 1
    assert factors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"] == 0.25
    assert factors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.default.weight"] == 0.25
    assert factors["base_model.model.model.layers.0.self_attn.o_proj.lora_B.default.weight"] == 1


def shard_too(cases):
    """Two processes share each layer, and two such pairs shard it and read other rows."""
    with join(CPU) as world:
        mesh = Mesh(sizes_of(world.size, tp=2), "cpu")
        rows = examples()
        parts = [[padded_batch(rows[:1], pad_token_id=0)], [flat_batch(rows[1:], share=True)]]
        found = []
        for family, lora, options in cases:
            one, shared = make(family, lora, **options), make(family, lora, **options)
            split_layers(shared, mesh["tp"])
            policies = Policy(one), Policy(shared)
            for block in [*blocks_of(policies[1].inner), shared]:
                fully_shard(block, mesh=mesh["dp"])
            for module in shared.modules():
                if isinstance(module, FSDPModule):  # sums, not means
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
            optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, eps=1e-3) for model in (one, shared)]
            wanted = sum(policies[0].cross_entropy(batch)[0] for part in parts for batch in part)
            wanted.backward()
            loss = torch.zeros(())
            for batch in parts[mesh.rank("dp")]:
                part = through(shared, policies[1].cross_entropy, batch)[0]
                part.backward()
                loss += part.detach()
            dist.all_reduce(loss, group=mesh.group("dp"))
            assert_same(loss, wanted.detach(), gradients(shared), gradients(one))
            assert_same_norm(one, shared)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            gathered = whole(shared)
            if world.is_main:
                for name, tensor in one.state_dict().items():
                    torch.testing.assert_close(gathered[name], tensor, atol=1e-5, rtol=1e-5)
            assert world.is_main or gathered == {}
            fill(shared, {name: tensor * 2 for name, tensor in make(family, lora, **options).state_dict().items()})
            gathered = whole(shared)
            if world.is_main:
                for name, tensor in make(family, lora, **options).state_dict().items():
                    assert torch.equal(gathered[name], tensor * 2), name
            found.append({name: parameter.to_local().numel() / parameter.numel() for name, parameter in shared.named_parameters()})
        return found


def through(model, function, *arguments):
    """``function`` inside a forward pass of ``model``, so that the weights of its root are gathered."""
    own = model.forward
    model.forward = lambda: function(*arguments)
    try:
        return model()
    finally:
        model.forward = own


def test_layers_that_are_shared_can_be_sharded_too():
    cases = [
        ("qwen3", None, {"vocab_size": 132, "tie_word_embeddings": True}),
        ("llama", {"target_modules": LINEAR}, {"num_hidden_layers": 1}),
        ("mixtral", None, {"num_hidden_layers": 1}),
    ]
    for held in run_ranks(4, shard_too, cases):
        for share in held:
            split = {value for name, value in share.items() if "norm" not in name and "lora_" not in name and "mlp.gate.weight" not in name}
            assert split == {0.25}
            assert {value for name, value in share.items() if "norm" in name} == {0.5}


def save_both(folder):
    with join(CPU) as world:
        mesh = Mesh(sizes_of(world.size, tp=world.size), "cpu")
        cases = {"tied": ({"tie_word_embeddings": True}, None), "apart": ({}, None), "adapter": ({}, {"target_modules": LINEAR})}
        for name, (options, lora) in cases.items():
            one, shared = make("qwen3", lora, **options), make("qwen3", lora, **options)
            split_layers(shared, mesh["tp"])
            state = whole(shared)
            if world.is_main:
                for model, place, more in ((one, "one", {}), (shared, "shared", {"state_dict": state})):
                    if lora is None:
                        model.save_pretrained(folder / name / place, **more)
                    else:
                        save_adapter(model, folder / name / place, **more)
            if lora is not None:
                assert fuse(shared, torch.arange(4)[None]).num_layers == 0


def test_files_are_those_of_the_model_that_was_split(tmp_path):
    run_ranks(2, save_both, tmp_path)
    for name, file in (("tied", "model"), ("apart", "model"), ("adapter", "adapter_model")):
        one, shared = ((tmp_path / name / place / f"{file}.safetensors").read_bytes() for place in ("one", "shared"))
        assert len(one) > 10_000 and one == shared, name


def seeing(seen, gradient, outputs, *args, **kwargs):
    seen.append(outputs.shape[-1])
    return gradient(outputs, *args, **kwargs)


def gather_nothing():
    with join(CPU) as world:
        mesh = Mesh(sizes_of(world.size, tp=world.size), "cpu")
        results = []
        for family in ("llama", "gemma2"):
            model = make(family)
            split_layers(model, mesh["tp"])
            checkpoint_activations(model, None)
            policy = Policy(model.train())
            seen = []
            with (
                mock.patch.object(dist, "all_gather_single", None),
                mock.patch.object(torch.autograd, "grad", functools.partial(seeing, seen, torch.autograd.grad)),
            ):
                loss = policy.cross_entropy(batches()[1])[0]
                loss.backward()
            results.append((float(loss.detach()), isinstance(policy.head, torch.Tensor), seen))
        return results


def test_the_loss_gathers_no_logits_and_blocks_can_be_recomputed():
    plain, capped = run_ranks(2, gather_nothing)[0]
    assert plain[1:] == (True, [])
    assert capped[1] is False and set(capped[2]) == {64}  # half of 128 tokens
    for family, found in (("llama", plain), ("gemma2", capped)):
        torch.testing.assert_close(found[0], float(Policy(make(family)).cross_entropy(batches()[1])[0].detach()), atol=0, rtol=1e-5)


def refuse():
    told = []
    with join(CPU) as world:
        mesh = Mesh(sizes_of(world.size, tp=world.size), "cpu")
        model = make("llama", num_key_value_heads=1)
        before = dict(model.named_parameters())
        told.append(refusal(split_layers, model, mesh["tp"]))
        assert all(parameter is before[name] and type(parameter) is nn.Parameter for name, parameter in model.named_parameters())
        for change in ({"q_norm": None}, {"o_proj": None}, {"o_proj": "rowwise_split_input"}):
            model = make("qwen3")
            for key in list(model._tp_plan):
                if (name := key.rpartition(".")[2]) in change:
                    model._tp_plan[key] = change[name] or "replicate"
            told.append(refusal(split_layers, model, mesh["tp"]))
    return told


def refusal(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return f"{caught.value.message}; {caught.value.hint}"


def test_a_plan_that_does_not_fit_is_refused_in_every_process():
    first, second = run_ranks(2, refuse)
    assert first == second
    assert first[0] == (
        "--tensor_model_parallel_size 2 does not divide the 1 heads of model.layers.0.self_attn.k_proj; this model can be split over 1"
    )
    assert "split, model.layers.0.self_attn.q_norm.weight gets another gradient" in first[1]
    assert "Qwen3ForCausalLM does not fit this model" in first[2] and "--fsdp fsdp2" in first[2]
    assert "does not fit this model" in first[3]


def adapted(family="llama", **settings):
    return peft.get_peft_model(build(family), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).get_base_model()


def quantized():
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama")
    model.model.layers[0].mlp.down_proj = bnb.nn.Linear4bit(48, 32, bias=False)
    return model


def planned(style):
    model = copy.deepcopy(build("llama"))
    model._tp_plan["model.layers.*.mlp.down_proj"] = style
    return model


@pytest.mark.parametrize(
    "model, size, text",
    [
        (lambda: build("gpt2"), 2, "GPT2LMHeadModel of transformers has no plan for it"),
        (lambda: build("llama", intermediate_size=50), 4, "does not divide the 2 heads of model.layers.0.self_attn.k_proj"),
        (lambda: build("llama", intermediate_size=49), 2, "2 does not divide the 49 outputs of model.layers.0.mlp.gate_proj"),
        (lambda: build("mixtral", intermediate_size=47), 2, "2 does not divide the 47 rows of model.layers.0.mlp.experts.gate_up_proj"),
        (lambda: build("llama", vocab_size=5, num_attention_heads=4, num_key_value_heads=4), 4, "leaves a process without a row"),
        (lambda: adapted(target_modules=["q_proj"], use_dora=True), 2, "cannot split the LoRA of model.layers.0.self_attn.q_proj: DoRA"),
        (lambda: adapted(target_modules=["embed_tokens"]), 2, "LoRA of linear layers alone, and model.embed_tokens has lora.Embedding"),
        (quantized, 2, "model.layers.0.mlp.down_proj is a Linear4bit, and plain linear layers alone can be split"),
        (lambda: planned("packed_colwise"), 2, "has model.layers.0.mlp.down_proj as packed_colwise, which is not built"),
    ],
    ids=["no plan", "kv heads", "mlp", "experts", "vocabulary", "dora", "embedding", "4 bits", "style"],
)
def test_what_cannot_be_split_is_named(model, size, text):
    told = refusal(read_plan, model(), size)
    assert text in told and "--tensor_model_parallel_size" in told and "\n" not in told


def test_other_tuners_are_refused_by_name():
    model = peft.get_peft_model(build("llama"), peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)).get_base_model()
    assert "model.layers.0.self_attn.q_proj has vera.Linear" in refusal(read_plan, model, 2)
