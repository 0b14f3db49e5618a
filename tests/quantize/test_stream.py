"""A model run block by block is the model, and what is gathered on the way is what the whole model sees."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swift.config.commands import QuantizeConfig
from swift.config.options import build as build_config
from swift.errors import ConfigError, MachineError, ModelError
from swift.export.folder import REPORT_FILE, partial_folder
from swift.model.artifact import ModelFolder
from swift.model.load import load_model
from swift.model.quantized.base import GroupedWeight
from swift.model.tokenizer import load_tokenizer
from swift.quantize.base import Inputs
from swift.quantize.calibrate import documents
from swift.quantize.head import measure
from swift.quantize.passes import BlockPasses, batches_of, gather, mirror
from swift.quantize.skeleton import Skeleton
from swift.quantize.store import Store
from swift.quantize.tensors import Checkpoint
from swift.quantize.trial import find_levels
from tests.families import FAMILIES, build
from tests.quantize.runs import ROWS, dense, held_out, quantize, wide
from tests.tiny import CHATML, make_model, make_tokenizer

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


SCALED = ["llama", "qwen2", "qwen3", "phi3", "granite", "mixtral"]
OTHERS = ["cohere", "gemma2", "gemma3_text", "olmo2", "opt", "gpt_neox"]


@pytest.mark.parametrize("family", SCALED + OTHERS)
def test_awq_scales_what_it_can_and_measures_what_it_wrote(family, tmp_path, rows):
    """The report's divergence beside transformers' forward pass with every tensor of the written file, norms included."""
    folder = tmp_path / "m"
    size = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 320, "head_dim": 16, "max_position_embeddings": 512}
    size |= {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {}
    model = build(family, **size, bos_token_id=None, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    out = quantize(folder, rows, tmp_path / "q", quant_method="awq")
    report = json.loads((out / REPORT_FILE).read_text())
    kept, original = (Checkpoint(sorted(place.glob("*.safetensors"))) for place in (out, folder))
    pieces = held_out(folder, rows)
    filled = tmp_path / "dense"
    shutil.copytree(folder, filled)
    tensors = {name: kept.read(name) if name in kept else dense(out, name.removesuffix(".weight"), "awq") for name in original.sources}
    save_file(tensors, filled / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        before, after = (
            [loaded.model(input_ids=torch.tensor([piece])).logits[0].log_softmax(-1) for piece in pieces]
            for loaded in (load_model(place, torch_dtype="float32", device="cpu") for place in (folder, filled))
        )
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True)) / sum(map(len, pieces))
    assert report["kl"] == pytest.approx(kl, rel=1e-2)
    assert 0 < report["kl"] < 0.2
    moved = [name for name in original.sources if name in kept and not torch.equal(kept.read(name), original.read(name))]
    assert bool(moved) or family not in SCALED  # norms that took a scale


def test_a_quantized_model_has_fewer_bytes_and_a_report(tmp_path, rows):
    model = wide(tmp_path / "m")
    (model / "swift-snapshot.json").write_text("{}")  # what the cache knows of the files: not of the new ones
    out = quantize(model, rows, tmp_path / "q")
    report = json.loads((out / REPORT_FILE).read_text())
    assert report["bytes_after"] < report["bytes_before"]
    assert report["tokens"] > 50
    assert 0 < report["kl"] < 0.05
    assert report["perplexity_after"] == pytest.approx(report["perplexity_before"], rel=0.1)
    assert len(report["worst_layers"]) == 8
    assert not partial_folder(out).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "q", "rows.jsonl"]
    around = {"README.md", "audit.jsonl", "config.json", "generation_config.json", "model.safetensors", REPORT_FILE}
    around |= {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == around
    original = load_file(model / "model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    weight = dense(out, layer)
    assert (weight - original[f"{layer}.weight"]).abs().max() < 0.02
    kept = load_file(out / "model.safetensors")
    assert torch.equal(kept["model.norm.weight"], original["model.norm.weight"])
    assert f"{layer}.weight" not in kept


def test_measured_by_blocks_is_measured_on_the_whole_model(tmp_path, rows):
    """The report's divergence beside transformers' forward pass with the weights that the file gives."""
    model = wide(tmp_path / "m")
    out = quantize(model, rows, tmp_path / "q", quant_bits=2)
    report = json.loads((out / REPORT_FILE).read_text())
    loaded = load_model(model, torch_dtype="float32", device="cpu")
    pieces = held_out(model, rows)
    with torch.inference_mode():
        before = [loaded.model(input_ids=torch.tensor([piece])).logits[0].log_softmax(-1) for piece in pieces]
        for name, module in loaded.model.model.layers.named_modules():
            if type(module) is nn.Linear:
                module.weight.copy_(dense(out, f"model.layers.{name}"))
        after = [loaded.model(input_ids=torch.tensor([piece])).logits[0].log_softmax(-1) for piece in pieces]
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True)) / sum(map(len, pieces))
    assert report["kl"] == pytest.approx(kl, rel=1e-3)


def test_calibration_and_measuring_share_no_document(tmp_path, rows):
    model = wide(tmp_path / "m")
    given = {
        "model": str(model),
        "quant_method": "gptq",
        "dataset": [str(rows)],
        "quant_n_samples": 20,
        "quant_eval_samples": 6,
        "max_length": 64,
    }
    config = build_config(QuantizeConfig, ("argument", given))
    found = documents(config, load_tokenizer(model))
    again = documents(build_config(QuantizeConfig, ("argument", given | {"quant_n_samples": 3})), load_tokenizer(model))
    assert len(found.held_out) == 6
    assert len(found.calibration) == 20
    assert again.held_out == found.held_out
    assert not {tuple(piece[:30]) for piece in found.held_out} & {tuple(piece[:30]) for piece in found.calibration}
    assert found.calibration[0][:3] == load_tokenizer(model)("<|im_start|>user\n").input_ids[:3]  # the chat template


@pytest.mark.parametrize("chat_template", [None, CHATML])
def test_the_built_in_text_serves_models_with_and_without_a_chat_template(chat_template, tmp_path):
    model = wide(tmp_path / "m", chat_template=chat_template)
    given = {"model": str(model), "quant_method": "gptq", "quant_n_samples": 40, "quant_eval_samples": 8, "max_length": 64}
    found = documents(build_config(QuantizeConfig, ("argument", given)), load_tokenizer(model))
    assert (len(found.calibration), len(found.held_out)) == (40, 8)
    begins = load_tokenizer(model)("<|im_start|>").input_ids
    assert any(piece[: len(begins)] == begins for piece in found.calibration) is (chat_template is not None)


def test_too_much_lost_leaves_nothing(tmp_path, rows):
    model = wide(tmp_path / "m")
    with pytest.raises(ModelError, match=r"more than --max_kl 1e-09"):
        quantize(model, rows, tmp_path / "q", quant_bits=2, max_kl=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "rows.jsonl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path, rows, name, value):
    model = wide(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} holds numbers that are not finite"):
        quantize(model, rows, tmp_path / "q")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "rows.jsonl"]


@pytest.mark.parametrize(
    "options",
    [
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "quant_strategy": "tensor", "quant_activations": "static"},
        {"quant_method": "fp8", "quant_strategy": "block"},
        {"quant_method": "int8"},
        {"quant_method": "int8", "quant_activations": "static"},
        {"quant_method": "bnb", "quant_bits": 4},
        {"quant_method": "bnb", "quant_bits": 8},
        {"quant_method": "awq"},
        {"quant_method": "awq", "quant_format": "compressed-tensors"},
        {"quant_method": "gptq_v2", "quant_bits": 3},
        {"quant_method": "gptq", "quant_format": "gptq", "quant_bits": 2, "sym": False},
        {"quant_method": "gptq", "quant_bits": 4, "sym": False},
        {"quant_method": "gptq", "quant_bits": 8, "desc_act": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_report_is_what_a_reader_of_the_file_finds(options, tmp_path, rows):
    """Every method in its format: the divergence of the report beside that of the checkpoint as it is loaded, activations rounded too."""
    model = wide(tmp_path / "m")
    common = {"quant_bits": None, "group_size": 32 if options["quant_method"] in ("gptq", "gptq_v2", "awq") else None}
    out = quantize(
        model, rows, tmp_path / "q", **{name: value for name, value in (common | options).items() if value is not None}, bare=True
    )
    report = json.loads((out / REPORT_FILE).read_text())
    pieces = held_out(model, rows)
    models = [load_model(place, torch_dtype="float32", device="cpu", rounds_inputs=True).model for place in (model, out)]
    with torch.inference_mode():
        before, after = ([found(input_ids=torch.tensor([piece])).logits[0].float().log_softmax(-1) for piece in pieces] for found in models)
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True)) / sum(map(len, pieces))
    rounds_more = options["quant_method"] == "bnb" and options["quant_bits"] == 8  # bitsandbytes rounds inputs as it sees fit
    assert report["kl"] == pytest.approx(kl, rel=2e-2, abs=1e-6 if rounds_more else 2e-7)
    assert report["kl"] < 0.1


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_quantized_one_by_one_and_read_back(family, method, tmp_path, rows):
    folder = tmp_path / "m"
    size = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 320, "head_dim": 16}
    build(family, **size, bos_token_id=None, eos_token_id=2, pad_token_id=3, max_position_embeddings=512).save_pretrained(folder)
    make_tokenizer(folder)
    own = {"quant_method": method} | ({} if method == "fp8" else {"group_size": 32})
    out = quantize(folder, rows, tmp_path / "q", bare=True, **own)
    report = json.loads((out / REPORT_FILE).read_text())
    kept = Checkpoint(sorted(out.glob("*.safetensors")))
    expert = "block_sparse_moe.experts.3.w2" if family == "mixtral" else "mlp.experts.3.down_proj"
    part = "weight_scale" if method == "fp8" else "qweight"
    assert f"model.layers.1.{expert}.{part}" in kept
    models = [load_model(place, torch_dtype="float32", device="cpu", rounds_inputs=True).model for place in (folder, out)]
    pieces = held_out(folder, rows)
    with torch.inference_mode():
        before, after = ([found(input_ids=torch.tensor([piece])).logits[0].log_softmax(-1) for piece in pieces] for found in models)
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True)) / sum(map(len, pieces))
    assert report["kl"] == pytest.approx(kl, rel=2e-2, abs=2e-7)


def test_without_text_at_all_what_needs_none_is_quantized(tmp_path, rows):
    out = quantize(wide(tmp_path / "m"), rows, tmp_path / "q", quant_method="fp8", quant_eval_samples=0, bare=True)
    report = json.loads((out / REPORT_FILE).read_text())
    assert report["kl"] is None
    assert len(report["worst_layers"]) == 8


def test_a_quantized_checkpoint_is_refused(tmp_path, rows):
    out = quantize(wide(tmp_path / "m"), rows, tmp_path / "q")
    with pytest.raises(ModelError, match="quantized already"):
        quantize(out, rows, tmp_path / "again")


def test_an_unknown_architecture_is_refused(tmp_path, rows):
    model = wide(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nobody_knows_it"}))
    with pytest.raises(ModelError, match="nobody_knows_it"):
        quantize(model, rows, tmp_path / "q")


def test_a_model_without_linear_layers_is_refused(tmp_path, rows):
    model = wide(tmp_path / "m")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, tmp_path / "gpt2" / name)
    with pytest.raises(ModelError, match="no linear layers"):
        quantize(tmp_path / "gpt2", rows, tmp_path / "q")


def test_a_missing_shard_is_named(tmp_path, rows):
    model = wide(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"):
        quantize(model, rows, tmp_path / "q")


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path, rows, monkeypatch):
    model = wide(tmp_path / "m")
    monkeypatch.setattr(os, "posix_fallocate", _full)
    with pytest.raises(MachineError, match="No space left"):
        quantize(model, rows, tmp_path / "q")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "rows.jsonl"]


def _full(*args: object) -> None:
    raise OSError(28, os.strerror(28))


def test_tied_and_separate_heads_stay_as_they_are(tmp_path, rows):
    for tied in (True, False):
        model = wide(tmp_path / f"m{tied}", tie_word_embeddings=tied)
        out = quantize(model, rows, tmp_path / f"q{tied}")
        kept = load_file(out / "model.safetensors")
        assert ("lm_head.weight" in kept) is not tied
        original = load_file(model / "model.safetensors")
        assert torch.equal(kept["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def test_groups_are_made_to_fit(tmp_path, rows, capsys):
    model = make_model(tmp_path / "m", hidden_size=96, intermediate_size=192)
    out = quantize(model, rows, tmp_path / "q", group_size=128)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == 32
    assert "groups of 32 inputs instead of 128: the layers have 96, 192 inputs" in capsys.readouterr().err


def test_layers_that_are_skipped_stay_and_are_listed(tmp_path, rows):
    model = wide(tmp_path / "m")
    out = quantize(model, rows, tmp_path / "q", quant_skip=["layers.0.mlp"])
    kept = load_file(out / "model.safetensors")
    original = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(kept[name], original[name])
    with pytest.raises(ConfigError, match="is in the name of no layer"):
        quantize(model, rows, tmp_path / "other", quant_skip=["nothing_like_it"])


def test_too_little_text_is_said(tmp_path, rows):
    rows.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    with pytest.raises(Exception, match="too little text"):
        quantize(wide(tmp_path / "m"), rows, tmp_path / "q")


def test_16_bits_for_what_is_not_quantized(tmp_path, rows):
    model = wide(tmp_path / "m")
    out = quantize(model, rows, tmp_path / "q", torch_dtype="bfloat16")
    kept = load_file(out / "model.safetensors")
    assert kept["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_norms_that_took_a_scale_are_stored_in_the_precision_that_is_asked_for(tmp_path, rows):
    """Not in that of the original, to which they would be rounded a second time."""
    model = wide(tmp_path / "m")
    load_model(model, torch_dtype="bfloat16", device="cpu").model.save_pretrained(model)
    out = quantize(model, rows, tmp_path / "q", bare=True, quant_method="int8", torch_dtype="float32")
    kept = load_file(out / "model.safetensors")
    norms = [tensor for name, tensor in kept.items() if name.endswith("layernorm.weight")]
    assert all(tensor.dtype == torch.float32 for tensor in norms)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in norms)


def test_what_was_not_quantized_is_named_in_the_config(tmp_path, rows):
    """vLLM looks for few bits in a router that is not named, and leaves a gate of one output out of it."""
    size = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    size |= {"vocab_size": 320, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512}
    build("qwen2_moe", **size, bos_token_id=None, eos_token_id=2, pad_token_id=3).save_pretrained(tmp_path / "m")
    make_tokenizer(tmp_path / "m")
    out = quantize(tmp_path / "m", rows, tmp_path / "q", bare=True, quant_method="int8")
    named = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    kept = load_file(out / "model.safetensors")
    matrices = {name.removesuffix(".weight") for name, tensor in kept.items() if tensor.dim() == 2 and tensor.dtype != torch.int8}
    layers = {name for name in matrices if not name.endswith(("weight_scale", "embed_tokens"))} | {"lm_head"}
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.shared_expert_gate"} < layers
    assert set(named) == layers


def test_experts_in_one_tensor_stay_and_are_named(tmp_path, rows, capsys):
    size = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 320, "head_dim": 16, "max_position_embeddings": 512}
    build("gpt_oss", **size, bos_token_id=None, eos_token_id=2, pad_token_id=3).save_pretrained(tmp_path / "m")
    make_tokenizer(tmp_path / "m")
    out = quantize(tmp_path / "m", rows, tmp_path / "q", bare=True, quant_method="fp8")
    assert "4 weights of experts in one tensor stay as they are, the first is model.layers.0.mlp.experts" in capsys.readouterr().err
    named = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in ("router", "experts")} <= set(named)


def test_several_files_with_an_index(tmp_path, rows):
    out = quantize(wide(tmp_path / "m"), rows, tmp_path / "q", max_shard_size="60KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    whole = quantize(tmp_path / "m", rows, tmp_path / "one")
    tensors = load_file(whole / "model.safetensors")
    assert set(index) == set(tensors)
    for name, file in index.items():
        assert torch.equal(load_file(out / file)[name], tensors[name])
    assert all(path.stat().st_size < 100_000 for path in out.glob("*.safetensors"))


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
