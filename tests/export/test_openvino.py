"""What openvino-genai and OpenVINO's runtime read, beside transformers."""

import numpy as np
import pytest
from tests.export.models import exported, greedy, saved

from swift.engine.openvino import library
from swift.errors import ModelError
from swift.export import openvino


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_answers_in_openvino_genai_as_in_transformers(family, tmp_path):
    model = saved(tmp_path / "model", family)
    artifact, measured = exported(openvino, model, tmp_path, "openvino", openvino_weight_format="fp32")
    assert measured.largest_difference < 1e-4
    assert measured.loader.startswith("openvino 20")
    genai, ov = library("openvino_genai"), library("openvino")
    pipeline = genai.LLMPipeline(artifact.path, "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
    prompt = [5, 60, 7, 90, 200]
    found = pipeline.generate(ov.Tensor(np.array([prompt])), max_new_tokens=20, ignore_eos=True, do_sample=False)
    assert found.tokens[0] == greedy(model, prompt, 20)


def test_the_tokenizer_and_chat_template_go_along(tmp_path):
    model = saved(tmp_path / "model", "llama")
    artifact, _ = exported(openvino, model, tmp_path, "openvino", openvino_weight_format="fp32")
    tokenizer = library("openvino_genai").Tokenizer(artifact.path)
    text = "The capital of France is Paris."
    from swift.model.tokenizer import load_tokenizer

    own = load_tokenizer(model.path)
    assert tokenizer.encode(text).input_ids.data[0].tolist() == own(text).input_ids
    messages = [{"role": "user", "content": "snow"}]
    rendered = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == rendered
    assert tokenizer.decode(own(text).input_ids) == text


@pytest.mark.parametrize(("weight_format", "bound"), [("fp16", 1e-4), ("int8", 1e-2)])
def test_fewer_bits_are_measured(weight_format, bound, tmp_path):
    model = saved(tmp_path / "model", "qwen3")
    artifact, measured = exported(openvino, model, tmp_path, "openvino", openvino_weight_format=weight_format)
    assert 0 < measured.kl < bound
    assert artifact.weight_bytes > 0


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", "soft caps"),
        ("mistral", "sees everything, that of this model 4 tokens"),
        ("mixtral", "OpenVINO cannot compute this model"),
    ],
)
def test_what_openvino_would_compute_otherwise_is_refused(family, why, tmp_path):
    with pytest.raises(ModelError, match=why):
        exported(openvino, saved(tmp_path / "model", family), tmp_path, "openvino")
    assert list((tmp_path / "made").iterdir()) == []
