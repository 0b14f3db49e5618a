"""Whole runs of the quantizer: what is written, what is said of it, and what is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swift.errors import ConfigError, MachineError, ModelError
from swift.export.folder import REPORT_FILE, partial_folder
from swift.model.load import load_model
from swift.quantize.tensors import Checkpoint
from tests.families import build
from tests.quantize.runs import ROWS, dense, held_out, quantize, wide
from tests.tiny import make_model, make_tokenizer

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
    out = quantize(
        wide(tmp_path / "m"), rows, tmp_path / "q", quant_method="fp8", quant_eval_samples=0, dataset=None, max_length=None, bare=True
    )
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
