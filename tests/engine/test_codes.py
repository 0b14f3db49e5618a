"""Weights that a checkpoint has in few bits: the kernels compute with exactly those, and the engine answers as torch does."""

import pytest
import torch
from torch.nn import functional as F

from swift.config.commands import InferConfig
from swift.config.options import build
from swift.engine.answers import answers
from swift.engine.base import Request, Sampling
from swift.engine.load import make_engine, source_of
from swift.engine.native.codes import format_of_codes, pack_codes
from swift.engine.native.packed import PackedLinear, pack_model, unpack
from swift.model.load import load_model
from swift.model.quantized.base import GroupedWeight, ScaledWeight, Settings
from tests.engine.test_compiled import as_computed_with, numbers
from tests.quantize.checkpoints import make_checkpoint, round_weight
from tests.tiny import make_model

GROUPED = [
    (4, 32, False, "int4_g32"),
    (4, 64, False, "int4_g64"),
    (4, 128, True, "int4_g128"),
    (4, -1, False, "int4_g128"),
    (3, 128, False, "int4_g128"),
    (2, 96, True, "int4_g32"),
    (8, 64, True, "int8"),
    (8, -1, True, "int8"),
    (8, 64, False, None),
    (8, 32, True, None),
    (4, 16, True, None),
]


def rounded(bits, size, symmetric, **fields):
    return round_weight(numbers(75, 384, seed=1), Settings("gptq", bits, size, symmetric, **fields))


@pytest.mark.parametrize(("bits", "size", "symmetric", "format"), GROUPED)
def test_the_format_of_a_checkpoints_weight(bits, size, symmetric, format):
    assert format_of_codes(rounded(bits, size, symmetric)) == format


def test_formats_of_weights_with_scales():
    numbers_of = {name: round_weight(numbers(64, 128), Settings(name, 8, strategy="channel")) for name in ("int8", "fp8")}
    assert format_of_codes(numbers_of["int8"]) == "int8"
    assert format_of_codes(numbers_of["fp8"]) is None
    assert format_of_codes(rounded(4, 64, True, desc_act=True)) is None


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize(("bits", "size", "symmetric", "format"), [case for case in GROUPED if case[3]])
def test_codes_come_back_as_they_are(bits, size, symmetric, format, width):
    weight = rounded(bits, size, symmetric)
    assert torch.equal(unpack(pack_codes(weight, format, width), format, 75, 384, width), weight.dequantize())


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_with_scales_comes_back_as_it_is(strategy):
    weight = round_weight(numbers(75, 384), Settings("int8", 8, strategy=strategy))
    assert torch.equal(unpack(pack_codes(weight, "int8", 16), "int8", 75, 384, 16), weight.dequantize())


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 13, 97])
@pytest.mark.parametrize(("bits", "size", "format"), [(4, 32, "int4_g32"), (4, 64, "int4_g64"), (3, 128, "int4_g128"), (8, 64, "int8")])
def test_the_kernels_compute_with_these_weights(bits, size, format, rows):
    weight, bias, x = rounded(bits, size, bits == 8), numbers(75, seed=2), numbers(rows, 384)
    layer = PackedLinear(weight, bias, format)
    x = as_computed_with(x, format)
    torch.testing.assert_close(layer(x), F.linear(x, weight.dequantize(), bias), rtol=1e-5, atol=1e-4)


def test_the_largest_products_overflow_nothing():
    """All codes 15 or -128, all inputs the largest of their group."""
    x = torch.full((2, 256), 3.0)
    scales = torch.ones(32, 2)
    codes = torch.full((32, 256), 15, dtype=torch.uint8)
    four = GroupedWeight(codes, scales, torch.zeros(32, 2, dtype=torch.uint8), 4, False)
    torch.testing.assert_close(PackedLinear(four, None, "int4_g128")(x), torch.full((2, 32), 3.0 * 15 * 256))
    eight = ScaledWeight(torch.full((32, 256), -128, dtype=torch.int8), torch.ones(32, 1))
    torch.testing.assert_close(PackedLinear(eight, None, "int8")(x), torch.full((2, 32), -3.0 * 128 * 256))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("wide") / "model", hidden_size=128, intermediate_size=256, num_attention_heads=4)


CHECKPOINTS = [
    ("gptq", Settings("gptq", 4, 128), {"int4_g128": 14, "float32": 1}),
    ("gptq", Settings("gptq", 4, 32, desc_act=True), {"float16": 14, "float32": 1}),
    ("gptq_v2", Settings("gptq", 8, 64), {"int8": 14, "float32": 1}),
    ("awq", Settings("awq", 4, 64, False), {"int4_g64": 14, "float32": 1}),
    ("compressed-tensors", Settings("gptq", 4, 32, False), {"int4_g32": 14, "float32": 1}),
    ("compressed-tensors", Settings("int8", 8, strategy="channel", activations="dynamic"), {"int8": 14, "float32": 1}),
    ("fp8", Settings("fp8", 8, strategy="block", activations="dynamic"), {"float16": 14, "float32": 1}),
]


@pytest.mark.parametrize(("name", "settings", "formats"), CHECKPOINTS)
def test_a_quantized_model_is_packed_without_loss(name, settings, formats, wide, tmp_path):
    """But for float16, which rounds to 11 bits."""
    make_checkpoint(wide, tmp_path / "model", name, settings)
    model = load_model(tmp_path / "model").model
    weights = {key: module.weight.clone() for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    packed = pack_model(model, "auto")
    assert packed.formats == formats
    for key, weight in weights.items():
        layer = model.get_submodule(key)
        assert torch.equal(layer.weight, weight.half().float() if layer.format == "float16" else weight)


@pytest.mark.parametrize("wanted", ["float32", "int8", "int4"])
def test_another_format_may_be_asked_for(wanted, wide, tmp_path):
    make_checkpoint(wide, tmp_path / "model", "awq", Settings("awq", 4, 64, False))
    model = load_model(tmp_path / "model").model
    pack_model(model, wanted)
    assert model.model.layers[0].mlp.up_proj.format == ("int4_g64" if wanted == "int4" else wanted)


@pytest.mark.parametrize(("name", "settings", "formats"), CHECKPOINTS)
def test_the_native_engine_answers_as_torch_does(name, settings, formats, wide, tmp_path):
    """Greedy tokens and their log-probabilities; inputs of 16 bits where torch has 32, and no rounding of inputs to 8 bits."""
    make_checkpoint(wide, tmp_path / "model", name, settings)
    engine = make_engine(source_of(build(InferConfig, ("argument", {"model": str(tmp_path / "model"), "val_dataset": "none.jsonl"}))))
    assert engine.runner.packed.formats == formats
    assert engine.runner.program is not None
    prompt = tuple(range(5, 25))
    sampling = Sampling(max_new_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    (answer,) = answers(engine, [Request(id="a", prompt=prompt, sampling=sampling)])
    reference = load_model(tmp_path / "model", dense=True).model
    ids = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.no_grad():
        wanted = reference(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert answer.token_ids == wanted.argmax(-1).tolist()
    found = torch.tensor([value.logprob for value in answer.logprobs])
    torch.testing.assert_close(found, wanted.amax(-1), rtol=0, atol=2e-3)
