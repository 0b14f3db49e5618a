"""Quantized checkpoints in torch: read by our own reader as by the packages that made the formats, trained on, and refused if broken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from swift.errors import ModelError
from swift.model.load import load_model
from swift.model.quantized.base import Settings
from swift.model.quantized.linear import QuantizedLinear
from tests.quantize.checkpoints import SKIPPED, change_config, make_checkpoint
from tests.tiny import make_model

IDS = torch.arange(3, 43)[None]
LAYERS = 13  # of 2 blocks with 7 each, without the one that is skipped


def settings(method, bits, size=-1, symmetric=True, **fields):
    return Settings(method, bits, size, symmetric, skipped=SKIPPED, **fields)


CHECKPOINTS = {
    "gptq": ("gptq", settings("gptq", 4, 64, False)),
    "gptq-3": ("gptq", settings("gptq", 3, 32)),
    "gptq-order": ("gptq", settings("gptq", 4, 32, desc_act=True)),
    "gptq_v2-2": ("gptq_v2", settings("gptq", 2, 32, False)),
    "gptq_v2-8": ("gptq_v2", settings("gptq", 8)),
    "awq": ("awq", settings("awq", 4, 32, False)),
    "ct-w4": ("compressed-tensors", settings("gptq", 4, 32)),
    "ct-w4-channel": ("compressed-tensors", settings("gptq", 4)),
    "ct-w4-asymmetric": ("compressed-tensors", settings("awq", 4, 32, False)),
    "ct-w8-asymmetric": ("compressed-tensors", settings("gptq", 8, 32, False)),
    "ct-w3": ("compressed-tensors", settings("gptq", 3, 32)),
    "ct-int8": ("compressed-tensors", settings("int8", 8, strategy="channel", activations="dynamic")),
    "ct-int8-static": ("compressed-tensors", settings("int8", 8, strategy="tensor", activations="static")),
    "ct-fp8": ("compressed-tensors", settings("fp8", 8, strategy="channel", activations="dynamic")),
    "ct-fp8-static": ("compressed-tensors", settings("fp8", 8, strategy="tensor", activations="static")),
    "ct-fp8-block": ("compressed-tensors", settings("fp8", 8, strategy="block", activations="dynamic")),
    "fp8": ("fp8", settings("fp8", 8, strategy="block", activations="dynamic")),
    "nf4": ("bnb", settings("bnb", 4, 64, extra={"quant_type": "nf4", "double_quant": True})),
    "fp4": ("bnb", settings("bnb", 4, 64, extra={"quant_type": "fp4", "double_quant": False})),
    "int8": ("bnb", settings("bnb", 8, strategy="channel")),
}
OWN = [name for name, (format, _) in CHECKPOINTS.items() if format != "bnb"]


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    return make_model(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=128, intermediate_size=256, num_attention_heads=4, tie_word_embeddings=False
    )


@pytest.fixture(scope="session")
def checkpoint(wide, tmp_path_factory):
    """(folder, dense weights by layers) of a name in CHECKPOINTS."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("quantized") / name
            made[name] = folder, make_checkpoint(wide, folder, *CHECKPOINTS[name])
        return made[name]

    return make


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of a checkpoint with some tensors changed; None removes one."""

    def make(name, **changes):
        folder = tmp_path / name
        shutil.copytree(checkpoint(name)[0], folder)
        tensors = load_file(folder / "model.safetensors")
        for part, change in changes.items():
            key = f"model.layers.1.mlp.up_proj.{part}"
            tensors[key] = change(tensors[key]) if change else None
        save_file({key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
        return folder

    return make


@torch.no_grad()
def log_probabilities(model):
    return model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


def dense_model(wide, weights):
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return model.eval()


@pytest.mark.parametrize("name", OWN)
def test_a_checkpoint_computes_what_its_dense_weights_do(name, wide, checkpoint):
    folder, weights = checkpoint(name)
    model = load_model(folder).model
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == LAYERS == len(weights)
    assert all(torch.equal(model.get_submodule(layer).weight, weight) for layer, weight in weights.items())
    assert torch.equal(log_probabilities(model), log_probabilities(dense_model(wide, weights)))


def dequantized(folder):
    """The checkpoint as compressed-tensors turns it into a dense model. The only way for zero points, of which 0.20 packs none itself."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name.startswith("ct-w")])
def test_compressed_tensors_unpacks_what_we_packed(name, checkpoint):
    """It dequantizes in the precision of the scales, which is float16."""
    folder, weights = checkpoint(name)
    model = dequantized(folder)
    assert all(torch.equal(model.get_submodule(layer).weight, weight.half().float()) for layer, weight in weights.items())
    torch.testing.assert_close(log_probabilities(model), log_probabilities(load_model(folder).model), rtol=0, atol=2e-3)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name.startswith(("ct-int8", "ct-fp8"))])
def test_compressed_tensors_rounds_inputs_as_we_do(name, checkpoint):
    """With int8 found while running its scale is the largest value over 127.5, that of vLLM and ours over 127."""
    folder, weights = checkpoint(name)
    model = dequantized(folder)
    assert all(torch.equal(model.get_submodule(layer).weight, weight) for layer, weight in weights.items())
    rounding = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = log_probabilities(load_model(folder, rounds_inputs=True).model)
    torch.testing.assert_close(log_probabilities(rounding), ours, rtol=0, atol=0.02 if name == "ct-int8" else 1e-5)


def test_transformers_reads_fp8_as_we_do(checkpoint):
    """Without a GPU it dequantizes and does not round inputs."""
    folder, weights = checkpoint("fp8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(torch.equal(model.get_submodule(layer).weight, weight) for layer, weight in weights.items())
    assert torch.equal(log_probabilities(model), log_probabilities(load_model(folder).model))


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_fp8_with_one_scale_for_a_tensor_is_read(activations, checkpoint, tmp_path):
    """The tensors of other tools: ``weight_scale`` in place of ``weight_scale_inv``."""
    folder, weights = checkpoint("ct-fp8-static")
    shutil.copytree(folder, tmp_path / "fp8")
    change_config(tmp_path / "fp8", quantization_config={"quant_method": "fp8", "activation_scheme": activations})
    model = load_model(tmp_path / "fp8").model
    assert all(torch.equal(model.get_submodule(layer).weight, weight) for layer, weight in weights.items())


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_transformers_reads_what_bitsandbytes_quantized(name, wide, checkpoint):
    """8 bits are multiplied with inputs of 8 bits, which moves log-probabilities by 0.01 here."""
    folder, weights = checkpoint(name)
    model = load_model(folder).model
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Linear8bitLt" if name == "int8" else "Linear4bit") == LAYERS
    wanted = log_probabilities(dense_model(wide, weights))
    torch.testing.assert_close(log_probabilities(model), wanted, rtol=0, atol=0.05 if name == "int8" else 1e-4)
    assert torch.equal(log_probabilities(load_model(folder, dense=True).model), wanted)


@pytest.mark.parametrize(("name", "bits"), [("gptq", 4), ("awq", 4), ("gptq-3", 3), ("gptq_v2-2", 2), ("ct-int8", 8), ("fp8", 8)])
def test_layers_stay_small_in_memory(name, bits, checkpoint):
    """Scales of 16 bits and zero points of 8 for groups of 32 inputs are 0.75 bit more."""
    layer = load_model(checkpoint(name)[0]).model.model.layers[0].mlp.up_proj
    kept = sum(part.numel() * part.element_size() for part in (*layer.buffers(), *layer.parameters()))
    assert kept * 8 <= (bits + 0.75) * layer.in_features * layer.out_features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_precision_of_the_model_changes_what_is_kept(dtype, checkpoint):
    model = load_model(checkpoint("awq")[0]).model
    weight = model.model.layers[0].mlp.up_proj.weight
    model.to(dtype).to(torch.float32)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    half = load_model(checkpoint("awq")[0], torch_dtype=str(dtype).removeprefix("torch.")).model
    assert half.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert half(input_ids=IDS).logits.dtype == dtype


@pytest.mark.parametrize("name", ["gptq", "ct-fp8", "fp8"])
def test_a_dense_model_has_plain_layers_and_no_quantization(name, wide, checkpoint, tmp_path):
    folder, weights = checkpoint(name)
    model = load_model(folder, dense=True).model
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(log_probabilities(again), log_probabilities(dense_model(wide, weights)))


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("gptq", "qweight", lambda t: t[:-1], r"up_proj: qweight \(15, 256\) does not hold 256 outputs of 128 inputs"),
        ("gptq", "scales", None, "a part of its quantized weight is missing"),
        ("awq", "qzeros", None, "a part of its quantized weight is missing"),
        ("ct-w4", "weight_scale", lambda t: t[:, :-1], "up_proj: "),
        ("fp8", "weight_scale_inv", lambda t: t[:-1], "up_proj: scales"),
        ("awq", "scales", lambda t: t * float("nan"), "scales that are not finite"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(name, part, change, message, copied):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(copied(name, **{part: change}))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gptq", {"quant_method": "gptq", "bits": 5}, "gptq with 5 bits is not supported"),
        ("gptq", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "weights in the format 'marlin' are not supported"),
        ("awq", {"quant_method": "awq", "bits": 4, "version": "gemv"}, "the layout 'gemv' of awq is not supported"),
        ("awq", {"quant_method": "nothing-known"}, "weights in the format 'nothing-known' are not supported"),
    ],
)
def test_a_format_that_is_not_known_is_refused_in_one_line(name, config, message, copied):
    folder = copied(name)
    change_config(folder, quantization_config=config)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message
