"""FP8 and int8: scales and codes by hand and by torch's own casts; scaling against the real error of int8 activations."""

import pytest
import torch
from torch import nn

from swift.errors import ModelError
from swift.model.quantized.base import Settings
from swift.quantize.base import Inputs, ScalingQuantizer
from swift.quantize.folds import Fold, divide_rows
from swift.quantize.scaled import FP8, INT8, Fp8, Int8, find_scales, find_smoothing


def layer_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def quantized(quantizer, weight, inputs=None):
    return quantizer.quantize({"x": layer_of(weight)}, inputs or Inputs())["x"]


def seen(x):
    return Inputs(len(x), None, x.abs().mean(0), x.abs().amax(0))


def test_int8_by_hand():
    found = quantized(Int8(Settings("int8", 8, strategy="channel")), torch.tensor([[127.0, -3, 0.4], [0, 0, 0], [-254, 5, 1.2]]))
    assert found.scales.tolist() == [[1], [1], [2]]
    assert found.codes.tolist() == [[127, -3, 0], [0, 0, 0], [-127, 2, 1]]  # 2.5 is rounded to even
    assert found.codes.dtype == torch.int8
    assert quantized(Int8(Settings("int8", 8, strategy="tensor")), torch.tensor([[127.0, -3], [254, 0]])).scales.tolist() == [[2]]


def test_fp8_is_torch_own_cast_of_what_is_divided_by_the_scale():
    torch.manual_seed(0)
    weight = torch.randn(8, 32) * torch.logspace(-3, 3, 8)[:, None]
    found = quantized(Fp8(Settings("fp8", 8, strategy="channel", activations="dynamic")), weight)
    assert torch.equal(found.scales, weight.abs().amax(1, keepdim=True) / 448)
    assert torch.equal(found.codes.float(), (weight / found.scales).to(torch.float8_e4m3fn).float())
    assert (found.dequantize() - weight).abs().max(1)[0].div(weight.abs().amax(1)).max() < 1 / 16
    assert found.input_scale is None


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (5, 7)])
def test_blocks_have_scales_of_their_own_also_at_the_edges(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[: shape[0] // 2] *= 50
    found = quantized(Fp8(Settings("fp8", 8, strategy="block")), weight)
    assert found.block == 128
    for row in range(found.scales.shape[0]):
        for column in range(found.scales.shape[1]):
            part = weight[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            assert float(found.scales[row, column]) == float(part.abs().max() / 448)
    assert found.scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert found.dequantize().shape == shape


def test_values_beyond_the_range_become_its_ends():
    values = torch.tensor([-1e9, -449.0, 449.0, 1e9])
    assert FP8.round(values).float().tolist() == [-448, -448, 448, 448]
    assert INT8.round(values).tolist() == [-128, -128, 127, 127]
    assert (find_scales(torch.zeros(3, 4), FP8, "channel") == 1).all()
    tiny = quantized(Fp8(Settings("fp8", 8, strategy="channel")), torch.full((1, 4), 1e-42))
    assert tiny.dequantize().isfinite().all()


@pytest.mark.parametrize("number", [FP8, INT8], ids=["fp8", "int8"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_what_is_known_of_inputs_makes_weights_better_for_them(number, strategy):
    torch.manual_seed(0)
    weight, mean_abs = torch.randn(160, 256), torch.ones(256)
    mean_abs[::64] = 30
    largest = find_scales(weight, number, strategy)

    def error(scales):
        if strategy == "block":
            scales = scales.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
        return float(((number.round(weight / scales).float() * scales - weight).square() * mean_abs.square()).sum())

    assert error(find_scales(weight, number, strategy, mean_abs)) <= error(largest)
    if strategy == "channel":
        assert error(find_scales(weight, number, strategy, mean_abs)) < 0.8 * error(largest)


@pytest.mark.parametrize(("quantizer", "largest"), [(Fp8, 448), (Int8, 127)])
def test_a_static_scale_is_that_of_the_largest_input(quantizer, largest):
    settings = Settings("x", 8, strategy="channel", activations="static")
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    assert quantized(quantizer(settings), torch.eye(2), seen(x)).input_scale == pytest.approx(3 / largest)
    assert quantized(quantizer(settings), torch.eye(2), seen(0 * x)).input_scale == 1.0
    with pytest.raises(ModelError, match="x: the calibration text does not reach it"):
        quantized(quantizer(settings), torch.eye(2))


def test_only_what_is_used_is_asked_for():
    assert Fp8(Settings("fp8", 8, activations="dynamic")).needs == frozenset()
    assert Fp8(Settings("fp8", 8, activations="static")).needs == {"mean_abs", "max_abs"}
    assert isinstance(Int8(Settings("int8", 8)), ScalingQuantizer) and not isinstance(Fp8(Settings("fp8", 8)), ScalingQuantizer)


class Block(nn.Module):
    """A norm and two layers that read it."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.RMSNorm(64), nn.Linear(64, 32), nn.Linear(64, 48)

    def forward(self, x):
        x = self.norm(x)
        return torch.cat([self.first(x), self.second(x)], -1)


def int8_output(weights, x, is_static):
    """As an engine computes it, in whole numbers."""
    outputs = []
    for weight in weights:
        step = torch.tensor(weight.input_scale) if is_static else x.abs().amax(1, keepdim=True) / 127
        codes = (x / step).round().clamp(-128, 127)
        outputs.append(codes @ weight.codes.float().T * step * weight.scales.T)
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_scaling_makes_int8_activations_with_outliers_many_times_better(activations):
    torch.manual_seed(0)
    block = Block()
    with torch.no_grad():
        block.norm.weight[::16] *= 40
        x = torch.randn(512, 64)
        before, normed = block(x) - torch.cat([block.first.bias, block.second.bias]), block.norm(x)
    settings, fold = Settings("int8", 8, strategy="channel", activations=activations), Fold("norm", torch.arange(64))
    layers, is_static = {"first": block.first, "second": block.second}, activations == "static"
    plain = Int8(settings).quantize(layers, seen(normed))
    plain_error = (int8_output(plain.values(), normed, is_static) - before).square().mean()
    with torch.no_grad():
        made, scale = Int8(settings).quantize_scaled(block, layers, seen(normed), fold, {}, torch.float32)
        torch.testing.assert_close(block(x) - torch.cat([block.first.bias, block.second.bias]), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(block.norm(x), normed / scale)
        error = (int8_output(made.values(), block.norm(x), is_static) - before).square().mean()
    assert error < 0.2 * plain_error


def test_inputs_that_are_alike_are_not_scaled_apart():
    ones = torch.ones(16)
    weight = torch.full((4, 16), 0.5)
    assert torch.equal(find_smoothing(weight, ones, ones, Fold("x", torch.arange(16)), is_static=True), ones)
    assert torch.equal(find_smoothing(weight, 0 * ones, 0 * ones, Fold("x", torch.arange(16)), is_static=True), ones)


def test_rows_of_int8_are_divided_and_a_tensor_with_one_scale_is_left_alone():
    weight = quantized(Int8(Settings("int8", 8, strategy="channel")), torch.tensor([[127.0, 1], [0, 254]]))
    assert divide_rows(weight, torch.tensor([2.0, 4.0])).dequantize().tolist() == [[63.5, 0.5], [0, 63.5]]
    torch.manual_seed(0)
    block, x = Block(), torch.randn(64, 64) * torch.logspace(0, 2, 64)
    settings = Settings("int8", 8, strategy="tensor", activations="dynamic")
    made = {"norm": weight}
    before = block.first.weight.clone()
    _, scale = Int8(settings).quantize_scaled(block, {"first": block.first}, seen(x), Fold("norm", torch.arange(64)), made, torch.float32)
    assert torch.equal(scale, torch.ones(64)) and torch.equal(block.first.weight, before) and made["norm"] is weight
