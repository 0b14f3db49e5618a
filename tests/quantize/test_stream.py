"""A model run block by block is the model, and what is gathered on the way is what the whole model sees."""

from pathlib import Path

import pytest
import torch
from torch import nn

from swift.errors import ModelError
from swift.model.artifact import ModelFolder
from swift.model.quantized.base import GroupedWeight
from swift.quantize.base import Inputs
from swift.quantize.head import measure
from swift.quantize.passes import BlockPasses, batches_of, gather, mirror
from swift.quantize.skeleton import Skeleton
from swift.quantize.store import Store
from swift.quantize.trial import find_levels
from tests.families import FAMILIES, build

CPU = torch.device("cpu")


def saved(family: str, path: Path, **options) -> ModelFolder:
    build(family, **options).save_pretrained(path)
    return ModelFolder(path, family)


def run_by_blocks(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    hidden = skeleton.embed(ids)
    for index, call in enumerate(skeleton.calls(tuple(ids.shape))):
        hidden = skeleton.run(skeleton.block(index), hidden, call)
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_model_by_blocks_gives_the_logits_of_the_model(family, tmp_path):
    folder = saved(family, tmp_path)
    ids = torch.randint(5, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(folder, CPU)
    hidden = run_by_blocks(skeleton, ids)
    parts = []
    for rows in (slice(0, 50), slice(50, skeleton.vocabulary)):
        with skeleton.head(rows) as logits:
            parts.append(logits(hidden))
    wanted = build(family)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert torch.allclose(torch.cat(parts, -1), wanted, rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in skeleton.blocks.parameters())


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@torch.inference_mode()
def test_routers_that_keep_a_buffer_are_those_of_the_files(family, tmp_path):
    """transformers initializes a module as a whole, weights too, where its buffers have to be made."""
    size = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    size |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
    size |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = build(family, **size)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.5, 0.5, len(buffer)))
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(ModelFolder(tmp_path, family), CPU)
    state = model.state_dict()
    block = skeleton.block(1)
    for part in ("weight", "e_score_correction_bias"):
        assert torch.equal(block.state_dict()[f"mlp.gate.{part}"], state[f"model.layers.1.mlp.gate.{part}"])
    ids = torch.randint(5, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    with skeleton.head(slice(0, skeleton.vocabulary)) as logits:
        found = logits(run_by_blocks(skeleton, ids))
    wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_blocks_that_look_at_the_tokens_themselves_are_refused(tmp_path, monkeypatch):
    skeleton = Skeleton(saved("llama", tmp_path), CPU)
    decoder = skeleton._shell
    forward = decoder.layers[0].forward

    def with_tokens(hidden, *args, **kwargs):
        return forward(hidden, *args, **kwargs, per_layer_input=hidden.sum(-1))

    monkeypatch.setattr(decoder.layers[0], "forward", with_tokens)
    with pytest.raises(ModelError, match="its blocks look at the tokens beside the hidden states"):
        skeleton.calls((1, 4))


@torch.inference_mode()
def test_divergence_and_perplexity_in_parts_of_the_vocabulary_are_those_of_whole_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("swift.quantize.head.PART", 37)
    skeleton = Skeleton(saved("gemma2", tmp_path / "m"), CPU)
    pieces = [[5, 6, 7, 8, 90, 100], [11, 12, 13]]
    stores = [Store(tmp_path / name, [32 * len(piece) for piece in pieces]) for name in "ab"]
    kl = before = after = same = 0.0
    for index, piece in enumerate(pieces):
        hidden = run_by_blocks(skeleton, torch.tensor([piece]))
        moved = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(index))
        rows = []
        with skeleton.head(slice(0, 128)) as logits:
            for store, states in zip(stores, (hidden, moved), strict=True):
                store.write(index, states)
                rows.append(logits(states)[0].log_softmax(-1))
        kl += float((rows[0].exp() * (rows[0] - rows[1])).sum())
        following = torch.tensor(piece[1:])[:, None]
        before -= float(rows[0][:-1].gather(1, following).sum())
        after -= float(rows[1][:-1].gather(1, following).sum())
        same += int((rows[0].argmax(-1) == rows[1].argmax(-1)).sum())
    found = measure(skeleton, pieces, *stores)
    assert found.tokens == 9
    assert found.kl == pytest.approx(kl / 9, rel=1e-4)
    assert found.perplexity_before == pytest.approx(torch.tensor(before / 7).exp().item(), rel=1e-4)
    assert found.perplexity_after == pytest.approx(torch.tensor(after / 7).exp().item(), rel=1e-4)
    assert found.same_token == pytest.approx(same / 9)


def test_batches_hold_every_token_once_and_little_padding():
    documents = [list(range(1, n + 1)) for n in (70, 5, 64, 33, 64, 7, 200)]
    batches = batches_of(documents, 2)
    assert sorted(length for batch in batches for length in batch.lengths) == sorted(map(len, documents))
    for batch in batches:
        states = batch.ids[..., None].float()
        kept = batch.keep(states)
        assert kept.shape == (batch.tokens, 1)
        assert (kept > 0).all()  # token 0 is padding here


def test_inputs_are_means_and_maxima_over_all_rows():
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    inputs = Inputs()
    for part in x.split(7):
        gather(inputs, part, frozenset({"hessian", "mean_abs", "max_abs"}))
    assert torch.allclose(mirror(inputs.hessian), x.T @ x / 50, atol=1e-6)
    assert torch.allclose(inputs.mean_abs, x.abs().mean(0), atol=1e-6)
    assert torch.equal(inputs.max_abs, x.abs().amax(0))
    assert inputs.count == 50


@pytest.mark.parametrize(
    ("family", "levels"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]),
        ("phi3", [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)]),
        ("cohere", [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]),
        ("opt", [("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)]),
        ("gpt_neox", [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)]),
    ],
)
@torch.inference_mode()
def test_layers_that_share_an_input_are_found(family, levels, tmp_path):
    skeleton = Skeleton(saved(family, tmp_path), CPU)
    ids = torch.arange(5, 15)[None]
    block, hidden, call = skeleton.block(0), skeleton.embed(ids), skeleton.calls((1, 10))[0]
    found, _ = find_levels(block, lambda: skeleton.run(block, hidden, call), lambda name: False)
    # torch's order of computing q, k and v is the model's affair
    named = [[sorted(name.rpartition(".")[2] for name in group.layers) for group in level] for level in found]
    assert named == [[sorted(level)] for level in levels]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "cohere", "gpt_neox", "opt", "mixtral", "qwen3_moe"])
@torch.inference_mode()
def test_each_layer_sees_what_its_quantized_predecessors_give(family, tmp_path):
    """Layers are replaced by ones with noise as soon as their inputs are known: the Hessians are those of the noisy block."""
    folder = saved(family, tmp_path / "m")
    documents = [torch.randint(5, 120, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 33, 20, 9)]
    skeleton = Skeleton(folder, CPU)
    batches = batches_of(documents, 2)
    hidden = Store(tmp_path / "h", [batch.ids.numel() * 32 for batch in batches])
    calls = {batch.shape: skeleton.calls(batch.shape)[0] for batch in batches}
    for index, batch in enumerate(batches):
        hidden.write(index, skeleton.embed(batch.ids))
    block = skeleton.block(0)
    passes = BlockPasses(skeleton, block, batches, hidden, calls, tmp_path)
    seen: dict[str, Inputs] = {}
    noise = torch.Generator().manual_seed(5)
    for level in passes.levels(lambda name: False):
        for group, inputs in passes.inputs(level, frozenset({"hessian", "max_abs"})):
            seen[group.layers[0]] = Inputs(inputs.count, None if inputs.hessian is None else inputs.hessian.clone(), None, inputs.max_abs)
            for name in group.layers:
                layer = block.get_submodule(name)
                layer.weight = nn.Parameter(layer.weight + 0.05 * torch.randn(layer.weight.shape, generator=noise), requires_grad=False)
            passes.finish(group, block.get_submodule(group.layers[-1]).weight)
    out = Store(tmp_path / "o", [batch.ids.numel() * 32 for batch in batches])
    passes.outputs(out)
    passes.close()
    wanted = {name: Inputs() for name in seen}
    for index, batch in enumerate(batches):
        for row, length in enumerate(batch.lengths):
            handles = [
                block.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, name=name: gather(
                        wanted[name], args[0].reshape(-1, args[0].shape[-1]), frozenset({"hessian", "max_abs"})
                    )
                )
                for name in seen
            ]
            whole = skeleton.run(block, hidden.read(index)[row : row + 1, :length], skeleton.calls((1, length))[0])
            for handle in handles:
                handle.remove()
            assert torch.allclose(out.read(index)[row, :length], whole[0], atol=3e-3, rtol=3e-3)  # parts are kept in float16
    for name, inputs in seen.items():
        assert inputs.count == wanted[name].count, name
        if inputs.count:
            near = 1e-2 if "experts" in name else 1e-3  # products of few inputs that were kept in float16
            gap = (inputs.hessian - mirror(wanted[name].hessian)).abs().max()
            assert gap < near * inputs.hessian.abs().max(), name


def test_numbers_of_any_size_are_kept_in_float16(tmp_path):
    store = Store(tmp_path / "s", [8, 8, 8], torch.float16)
    wanted = [torch.tensor([3e9, -1.5e6, 0.0, 7e8]), torch.tensor([1e-12, -3e-13, 0.0, 2e-13]), torch.zeros(4)]
    for index, values in enumerate(wanted):
        store.write(index, values)
        assert torch.allclose(store.read(index), values, rtol=6e-4)
    store.close()


def test_memory_of_a_weight_is_small():
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    weight = GroupedWeight(codes, torch.ones(4, 2), torch.full((4, 2), 8, dtype=torch.uint8), 4, True)
    assert torch.equal(weight.dequantize(), torch.full((4, 64), -8.0))
