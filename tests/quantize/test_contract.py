"""What every quantizer promises, for all members of the registry."""

import pytest
import torch
from torch import nn

from swift.config.export import ExportConfig
from swift.errors import ConfigError, ModelError
from swift.model.quantized.base import GroupedWeight, ScaledWeight, Settings
from swift.quantize import QUANTIZERS
from swift.quantize.base import Inputs
from swift.quantize.grid import find_grid, round_to, round_to_nearest

SETTINGS = {
    "gptq": [Settings("gptq", 4, 32, True), Settings("gptq", 3, 32, False), Settings("gptq", 8, -1, True)],
    "awq": [Settings("awq", 4, 32, False)],
    "fp8": [
        Settings("fp8", 8, strategy=strategy, activations=activations)
        for strategy in ("tensor", "channel", "block")
        for activations in ("dynamic", "static")
    ],
    "int8": [
        Settings("int8", 8, strategy=strategy, activations=activations)
        for strategy in ("tensor", "channel")
        for activations in ("dynamic", "static")
    ],
    "bnb": [
        Settings("bnb", 4, extra={"quant_type": "nf4", "double_quant": True, "compute_dtype": "float32"}),
        Settings("bnb", 4, extra={"quant_type": "fp4", "double_quant": False, "compute_dtype": "float32"}),
        Settings("bnb", 8),
    ],
}
LARGEST = {2: 0.8, 3: 0.1, 4: 0.02, 8: 0.002}  # relative squared error of the weight alone, by bits
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]
IDS = [f"{name}-{settings.bits}-{settings.strategy}-{settings.activations}" for name, settings in CASES]


def test_every_member_is_tried():
    assert set(SETTINGS) == set(QUANTIZERS)


def quantizer_of(name, settings):
    if name == "bnb":
        pytest.importorskip("bitsandbytes")
    return QUANTIZERS.get(name)(ExportConfig(model="m", quant_method=name), settings)


def inputs_of(width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width, generator=generator) @ (torch.eye(width) + 0.1 * torch.randn(width, width, generator=generator))
    return Inputs(400, x.T @ x / 400, x.abs().mean(0), x.abs().amax(0))


def layers_of(width=64):
    torch.manual_seed(0)
    return {"q": nn.Linear(width, 48, bias=False), "k": nn.Linear(width, 16)}


def loss(difference, hessian):
    return float(torch.einsum("nk,kj,nj->", difference, hessian, difference))


def plain_rounding(weight, settings):
    """Of whole numbers: with the range of each group, channel or tensor as the scale."""
    if settings.method in ("gptq", "awq"):
        grid = round_to_nearest(weight, settings.bits, settings.group_size, settings.symmetric)
        return GroupedWeight(round_to(weight, *grid, settings.bits), *grid, settings.bits, settings.symmetric).dequantize()
    largest = weight.abs().max() if settings.strategy == "tensor" else weight.abs().amax(1, keepdim=True)
    return (weight * 127 / largest).round() * largest / 127


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_weights_have_the_shapes_of_their_layers_and_are_near_them(name, settings):
    layers = layers_of()
    before = {key: layer.weight.clone() for key, layer in layers.items()}
    quantizer = quantizer_of(name, settings)
    assert quantizer.needs <= {"hessian", "mean_abs", "max_abs"}
    made = quantizer.quantize(layers, inputs_of())
    assert list(made) == ["q", "k"]
    for key, weight in made.items():
        dense = weight.dequantize()
        assert torch.equal(layers[key].weight, before[key])
        assert dense.shape == before[key].shape and dense.dtype == torch.float32
        assert (dense - before[key]).square().sum() < LARGEST[settings.bits] * before[key].square().sum()
        if isinstance(weight, GroupedWeight):
            groups = 1 if settings.group_size == -1 else 2
            assert weight.codes.dtype == weight.zeros.dtype == torch.uint8 and int(weight.codes.max()) < 2**settings.bits
            assert weight.scales.shape == weight.zeros.shape == (len(dense), groups) and weight.scales.dtype == torch.float32
            assert torch.equal(weight.scales, weight.scales.half().float())
            assert (weight.bits, weight.symmetric) == (settings.bits, settings.symmetric)
            if settings.symmetric:
                assert (weight.zeros == 2 ** (settings.bits - 1)).all()
        if isinstance(weight, ScaledWeight):
            wanted = {"tensor": (1, 1), "channel": (len(dense), 1), "block": (1, 1)}[settings.strategy]
            assert weight.scales.shape == wanted and weight.scales.dtype == torch.float32
            assert (weight.block, weight.input_scale is not None) == (
                128 if settings.strategy == "block" else None,
                settings.activations == "static",
            )


@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if case[0] in ("gptq", "awq", "int8")])
def test_the_output_is_no_worse_than_by_plain_rounding(name, settings):
    layers, inputs = layers_of(), inputs_of()
    made = quantizer_of(name, settings).quantize(layers, inputs)
    error, plain = (
        sum(loss(dense(key) - layer.weight.detach(), inputs.hessian) for key, layer in layers.items())
        for dense in (lambda key: made[key].dequantize(), lambda key: plain_rounding(layers[key].weight.detach(), settings))
    )
    assert error <= plain * 1.001


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_the_same_inputs_give_the_same_weights(name, settings):
    first, second = (quantizer_of(name, settings).quantize(layers_of(), inputs_of()) for _ in range(2))
    for key in first:
        assert torch.equal(first[key].dequantize(), second[key].dequantize())


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_rows_of_zeros_and_of_one_number_are_kept(name, settings):
    layer = nn.Linear(64, 32, bias=False)
    layer.weight.data[:16], layer.weight.data[16:] = 0.0, 0.375
    dense = quantizer_of(name, settings).quantize({"x": layer}, inputs_of())["x"].dequantize()
    assert (dense[:16] == 0).all()
    torch.testing.assert_close(dense[16:], layer.weight.data[16:], rtol=0.07, atol=0)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_inputs_that_are_always_zero_harm_nothing(name, settings):
    inputs = inputs_of()
    inputs.hessian[:, 5] = inputs.hessian[5] = 0
    inputs.mean_abs[5] = inputs.max_abs[5] = 0
    layers = layers_of()
    for key, weight in quantizer_of(name, settings).quantize(layers, inputs).items():
        dense = weight.dequantize()
        assert dense.isfinite().all()
        assert loss(dense - layers[key].weight.detach(), inputs.hessian) < 0.2 * loss(layers[key].weight.detach(), inputs.hessian)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_layers_that_no_text_reached_are_quantized_or_refused(name, settings):
    layers = layers_of()
    if settings.activations == "static":
        with pytest.raises(ModelError, match="the calibration text does not reach it"):
            quantizer_of(name, settings).quantize(layers, Inputs())
    else:
        made = quantizer_of(name, settings).quantize(layers, Inputs())
        assert all(torch.isfinite(weight.dequantize()).all() for weight in made.values())


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_groups_that_do_not_fill_a_row_are_refused(name):
    settings = Settings(name, 4, 48, name == "gptq")
    with pytest.raises(ConfigError, match="groups of 48 weights do not fill rows of 64"):
        quantizer_of(name, settings).quantize(layers_of(), inputs_of())
    with pytest.raises(ConfigError):
        find_grid(torch.zeros(1, 64), 4, 0, True)
