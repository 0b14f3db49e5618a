"""TensorRT-LLM checkpoints: beside NVIDIA's own writer of them, put together again, and computed as TensorRT-LLM would.

No test builds an engine: that needs an NVIDIA GPU.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift.config.export import ExportConfig
from swift.config.options import build as options
from swift.errors import ConfigError, MachineError, ModelError
from swift.export import tensorrt_llm
from swift.export.folder import whole_folder
from swift.export.run import run_export
from swift.export.tensorrt_llm.guide import build_arguments
from swift.export.tensorrt_llm.reference import Interpreter
from swift.model.artifact import ModelFolder
from swift.quantize.measure import Reference
from tests.families import build
from tests.tiny import make_model, make_tokenizer

TEXTS = [list(range(3, 23)), list(range(100, 140))]
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
    "phi3": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
# Arguments of trtllm-build in tensorrt_llm/commands/build.py and tensorrt_llm/plugin/plugin.py, TensorRT-LLM 1.2.
KNOWN_ARGUMENTS = {
    "--checkpoint_dir", "--output_dir", "--max_batch_size", "--max_input_len", "--max_seq_len", "--gemm_plugin",
}  # fmt: skip


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes) -> ModelFolder:
    """A model with 322 tokens, which no even number of ranks divides beyond 2, with norms that are not one."""
    model = build(family, **{"vocab_size": 322, **FAMILIES.get(family, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return ModelFolder(folder, family)


def config_of(folder: Path, **changes) -> ExportConfig:
    return options(ExportConfig, ("test", {"model": str(folder), "to": "tensorrt_llm", "torch_dtype": "float32", **changes}))


def written(model: ModelFolder, folder: Path, **changes):
    """The checkpoint of ``model`` in ``folder``, and the comparison of what it computes with what the model computes."""
    config = config_of(model.path, **changes)
    tensorrt_llm.check(model, config)
    folder.mkdir()
    artifact = tensorrt_llm.run(model, config, folder)
    return tensorrt_llm.verify(artifact, Reference(model, TEXTS), config)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_what_the_model_computes(family, tensor, pipeline, tmp_path):
    pipeline = 1 if family == "phi3" else pipeline
    measured = written(saved(family, tmp_path / "m"), tmp_path / "out", tensorrt_tp_size=tensor, tensorrt_pp_size=pipeline)
    assert measured.largest_difference < 2e-5  # float32, summed over ranks in another order
    assert measured.same_token == 1.0
    assert "TensorRT-LLM itself was not run" in measured.notes[0]


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 16}),
        ("phi3", {"rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1.0, 1.1, 1.2, 1.3],
                  "long_factor": [2.0, 3.0, 4.0, 5.0], "partial_rotary_factor": 1.0}),
    ],
)  # fmt: skip
def test_rotary_scaling_is_carried_over(family, rope, tmp_path):
    changes = {"original_max_position_embeddings": 32} if family == "phi3" else {}
    model = saved(family, tmp_path / "m", rope_parameters={"rope_theta": 10000.0, **rope}, **changes)
    assert written(model, tmp_path / "out").largest_difference < 2e-5


def joined(folder: Path, tensor: int, pipeline: int, layers: int, heads: tuple[int, int, int], vocabulary: int) -> dict:
    """The tensors as transformers names them, put together from rank files by indices, without the exporter's code."""
    query, shared, width = heads
    files = [load_file(folder / f"rank{rank}.safetensors") for rank in range(tensor * pipeline)]
    found = {
        "model.embed_tokens.weight": torch.cat([files[rank]["transformer.vocab_embedding.weight"] for rank in range(tensor)]),
        "lm_head.weight": torch.cat([file["lm_head.weight"] for file in files[-tensor:]]),
        "model.norm.weight": files[-1]["transformer.ln_f.weight"],
    }
    found = {name: rows[:vocabulary] if len(rows) > vocabulary else rows for name, rows in found.items()}
    for layer in range(layers):
        stage, local = divmod(layer, layers // pipeline)
        own = files[stage * tensor : (stage + 1) * tensor]
        there, here = f"transformer.layers.{local}.", f"model.layers.{layer}."
        rows: dict[str, list] = {"q": [], "k": [], "v": []}
        for rank, file in enumerate(own):
            joint = file[there + "attention.qkv.weight"]
            count, least = query // tensor, max(1, shared // tensor)
            rows["q"].append(joint[: count * width])
            if shared >= tensor or rank % (tensor // shared) == 0:
                rows["k"].append(joint[count * width : (count + least) * width])
                rows["v"].append(joint[(count + least) * width :])
        for letter, cut in rows.items():
            found[f"{here}self_attn.{letter}_proj.weight"] = torch.cat(cut)
        found[here + "self_attn.o_proj.weight"] = torch.cat([file[there + "attention.dense.weight"] for file in own], 1)
        found[here + "mlp.gate_proj.weight"] = torch.cat([file[there + "mlp.fc.weight"] for file in own])
        found[here + "mlp.up_proj.weight"] = torch.cat([file[there + "mlp.gate.weight"] for file in own])
        found[here + "mlp.down_proj.weight"] = torch.cat([file[there + "mlp.proj.weight"] for file in own], 1)
        found[here + "input_layernorm.weight"] = own[0][there + "input_layernorm.weight"]
        found[here + "post_attention_layernorm.weight"] = own[-1][there + "post_layernorm.weight"]
    return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_ranks_put_together_are_the_model_bit_for_bit(tensor, pipeline, tmp_path):
    model = saved("llama", tmp_path / "m")
    written(model, tmp_path / "out", tensorrt_tp_size=tensor, tensorrt_pp_size=pipeline)
    reference = Reference(model, TEXTS)
    wanted = reference.log_probabilities(TEXTS[0])
    state = joined(tmp_path / "out", tensor, pipeline, 2, (4, 2, 8), 322)
    assert state.keys() == reference.loaded.state_dict().keys()
    with torch.no_grad():
        for parameter in reference.loaded.parameters():
            parameter.fill_(7.0)
    reference.loaded.load_state_dict(state)
    assert torch.equal(reference.log_probabilities(TEXTS[0]), wanted)


SPLITS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
MODELOPT = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from modelopt.torch.export import export_tensorrt_llm_checkpoint
root, splits = Path(sys.argv[1]), sys.argv[2].split(",")
for family, kind in (word.split(":") for word in sys.argv[3:]):
    for split in splits:
        model = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.bfloat16)
        tensor, pipeline = map(int, split.split("x"))
        export_tensorrt_llm_checkpoint(model, kind, torch.bfloat16, root / "theirs" / family / split, tensor, pipeline)
"""
KINDS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen", "qwen3": "qwen", "gemma": "gemma"}


@pytest.fixture(scope="module")
def by_modelopt(tmp_path_factory):
    """Models of all families in a folder, and what NVIDIA's package makes of them in ``theirs``, in a process of its own: its
    import, which takes half a minute, changes classes of transformers."""
    root = tmp_path_factory.mktemp("modelopt")
    for family in KINDS:
        saved(family, root / family, torch.bfloat16)
    splits = ",".join(f"{tensor}x{pipeline}" for tensor, pipeline in SPLITS)
    words = [sys.executable, "-W", "ignore", "-c", MODELOPT, str(root), splits, *(f"{family}:{kind}" for family, kind in KINDS.items())]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_ranks_are_those_that_nvidia_modelopt_writes(family, by_modelopt, tmp_path):
    model = ModelFolder(by_modelopt / family, family)
    for tensor, pipeline in SPLITS:
        ours, theirs = tmp_path / f"{tensor}x{pipeline}", by_modelopt / "theirs" / family / f"{tensor}x{pipeline}"
        written(model, ours, torch_dtype=None, tensorrt_tp_size=tensor, tensorrt_pp_size=pipeline)
        found, wanted = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
        same = (set(found) & set(wanted)) - {"logits_dtype", "use_parallel_embedding", "share_embedding_table"}
        assert len(same) > 15
        assert {name: found[name] for name in same} == {name: wanted[name] for name in same}
        for rank in range(tensor * pipeline):
            found, wanted = (load_file(folder / f"rank{rank}.safetensors") for folder in (ours, theirs))
            if family == "gemma":  # modelopt leaves out a head that is the embedding, on a rank without embedding too
                found.pop("lm_head.weight", None)
            assert {name: held.shape for name, held in found.items()} == {name: held.shape for name, held in wanted.items()}
            assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_texts_longer_than_the_model_was_made_for_are_compared_too(tmp_path):
    model = saved("llama", tmp_path / "m", max_position_embeddings=16)
    assert written(model, tmp_path / "out").largest_difference < 2e-5


def test_a_tensor_in_the_wrong_place_shows(tmp_path):
    model = saved("llama", tmp_path / "m")
    written(model, tmp_path / "out")
    file = tmp_path / "out" / "rank0.safetensors"
    tensors = load_file(file)
    name = "transformer.layers.1.mlp.{}.weight"
    tensors[name.format("fc")], tensors[name.format("gate")] = tensors[name.format("gate")], tensors[name.format("fc")]
    save_file(tensors, file)
    artifact = tensorrt_llm.Artifact(tmp_path / "out", "tensorrt_llm", ("rank0.safetensors",), {"rounded": False})
    with pytest.raises(ModelError, match="computes another model"):
        tensorrt_llm.verify(artifact, Reference(model, TEXTS), config_of(model.path))


def test_the_command_writes_a_whole_folder_with_its_report(tmp_path):
    make_model(tmp_path / "m")
    target = run_export(
        options(
            ExportConfig,
            (
                "test",
                {
                    "model": str(tmp_path / "m"),
                    "to": "tensorrt_llm",
                    "output_dir": str(tmp_path / "out"),
                    "quant_eval_samples": 2,
                    "max_length": 32,
                },
            ),
        )
    )
    settings = json.loads((target / "config.json").read_text())
    assert settings["architecture"] == "LlamaForCausalLM"
    assert settings["dtype"] == "float16"  # of a model in float32, as TensorRT-LLM's own converter does
    report = json.loads((target / "swift_report.json").read_text())
    assert 0 <= abs(report["kl"]) < 1e-4
    assert report["format"] == "tensorrt_llm"
    assert (target / "tokenizer" / "tokenizer.json").is_file()
    subprocess.run(["sh", "-n", str(target / "build_engine.sh")], check=True)


def test_the_build_command_has_arguments_that_trtllm_build_knows(tmp_path):
    config = config_of(tmp_path, tensorrt_max_batch_size=4, tensorrt_max_seq_len=512)
    words = build_arguments(config, {"max_position_embeddings": 256})
    assert words[0] == "trtllm-build"
    assert {word for word in words if word.startswith("--")} == KNOWN_ARGUMENTS
    assert shlex.join(words).endswith("--max_batch_size 4 --max_input_len 256 --max_seq_len 256 --gemm_plugin auto")


def test_weights_that_trtllm_build_rounds_stay_whole_here(tmp_path):
    measured = written(saved("llama", tmp_path / "m"), tmp_path / "out", tensorrt_llm_quant_algo="W8A16")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["quantization"] == {"quant_algo": "W8A16", "kv_cache_quant_algo": None}
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "rank0.safetensors").values()} == {torch.float32}
    assert "what that loses was not measured" in measured.notes[1]


def test_windows_of_attention_become_defaults_of_the_engine(tmp_path):
    written(saved("gemma2", tmp_path / "m"), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["runtime_defaults"] == {"max_attention_window": [4, 128]}


def test_odd_layers_go_to_the_first_stages(tmp_path):
    model = saved("llama", tmp_path / "m", num_hidden_layers=5)
    assert written(model, tmp_path / "out", tensorrt_pp_size=2).same_token == 1.0
    layers = [
        {name.split(".")[2] for name in load_file(tmp_path / "out" / f"rank{rank}.safetensors") if "layers" in name} for rank in (0, 1)
    ]
    assert layers == [{"0", "1", "2"}, {"0", "1"}]


@pytest.mark.parametrize(
    ("family", "changes", "options_", "said"),
    [
        ("gpt2", {}, {}, "no layout of TensorRT-LLM is known for the architecture GPT2LMHeadModel"),
        ("llama", {}, {"tensorrt_tp_size": 3}, "--tensorrt_tp_size 3 does not divide 4 attention heads"),
        ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}, {"tensorrt_tp_size": 3},
         "--tensorrt_tp_size 3 and 2 key/value heads do not divide each other"),
        ("llama", {"intermediate_size": 49}, {"tensorrt_tp_size": 2}, "does not divide the MLP width 49"),
        ("llama", {}, {"tensorrt_pp_size": 3}, "--tensorrt_pp_size 3 is more than the 2 layers"),
        ("phi3", {}, {"tensorrt_pp_size": 2}, "TensorRT-LLM builds Phi3ForCausalLM without pipeline stages"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}}, {},
         "does not compute the rotary scaling yarn"),
        ("llama", {"hidden_act": "tanh"}, {}, "does not compute the activation tanh"),
        ("qwen3", {"attention_bias": True}, {}, "no place for the tensor model.layers.0.self_attn.o_proj.bias"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_written(family, changes, options_, said, tmp_path):
    model = saved(family, tmp_path / "m", **changes)
    with pytest.raises((ConfigError, ModelError), match=said):
        tensorrt_llm.check(model, config_of(model.path, **options_))


def test_a_missing_tensor_is_named(tmp_path):
    model = saved("llama", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match=r"the tensor model.layers.1.mlp.up_proj.weight is missing"):
        tensorrt_llm.check(model, config_of(model.path))


def test_numbers_that_float16_does_not_hold_leave_nothing(tmp_path):
    model = saved("llama", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    config = config_of(model.path, torch_dtype="float16", output_dir=str(tmp_path / "out"), quant_eval_samples=0)
    with pytest.raises(ModelError, match=r"layers.1.mlp.gate.weight holds numbers too large for float16"):
        run_export(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    model = saved("llama", tmp_path / "m")
    with pytest.raises(MachineError, match="No space left"), whole_folder(tmp_path / "out") as folder:
        (folder / "rank1.safetensors").symlink_to("/dev/full")
        tensorrt_llm.run(model, config_of(model.path, tensorrt_tp_size=2), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_an_output_that_exists_stays(tmp_path):
    model = saved("llama", tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="out exists"):
        run_export(config_of(model.path, output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out" / "mine").read_text() == "kept"


@pytest.mark.parametrize("option", ["tensorrt_tp_size", "tensorrt_pp_size", "tensorrt_max_batch_size"])
def test_options_without_effect_are_refused(option, tmp_path):
    with pytest.raises(ConfigError, match=f"--{option}"):
        config_of(tmp_path, to="gguf", torch_dtype=None, **{option: 2})


def test_the_interpreter_reads_only_what_was_written(tmp_path):
    model = saved("qwen3", tmp_path / "m")
    reference = Reference(model, TEXTS)
    wanted = reference.log_probabilities(TEXTS[1])
    written(model, tmp_path / "out", tensorrt_tp_size=2)
    (tmp_path / "m" / "model.safetensors").unlink()
    found = Interpreter(tmp_path / "out", TEXTS).logits(TEXTS[1]).log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
