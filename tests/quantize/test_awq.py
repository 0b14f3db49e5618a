"""AWQ against rounding to the nearest and against GPTQ, whose rounding it shares."""

import pytest
import torch
from torch import nn

from swift.model.quantized.base import GroupedWeight, Settings
from swift.quantize.awq import Awq, Rounding, find_scale
from swift.quantize.base import Inputs, ScalingQuantizer
from swift.quantize.folds import Fold, find_folds
from swift.quantize.gptq import gptq
from swift.quantize.grid import round_to, round_to_nearest
from tests.quantize.blocks import block_of

SETTINGS = Settings("awq", 4, 32, False)


def outliers(inputs, outputs, seed):
    """A weight, and the Hessian of inputs of which some are 30 times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, inputs, generator=generator)
    x[:, torch.randperm(inputs, generator=generator)[: inputs // 16]] *= 30
    return torch.randn(outputs, inputs, generator=generator) * 0.05, x.T @ x / len(x)


def loss(difference, hessian):
    return float(torch.einsum("nk,kj,nj->", difference, hessian, difference))


def nearest(weight, group_size):
    grid = round_to_nearest(weight, 4, group_size, False)
    return GroupedWeight(round_to(weight, *grid, 4), *grid, 4, False).dequantize()


@pytest.mark.parametrize("seed", range(5))
def test_a_scale_is_much_better_than_rounding_to_the_nearest_where_inputs_have_outliers(seed):
    weight, hessian = outliers(64, 48, seed)
    rounding = Rounding(hessian, SETTINGS, 0.01)
    scale = find_scale(weight, rounding, Fold("x", torch.arange(64)))
    assert scale.max() > 2 * scale.min()
    scaled = loss(rounding.round(weight, scale).dequantize() / scale - weight, hessian)
    plain = loss(rounding.round(weight, torch.ones(64)).dequantize() - weight, hessian)
    assert scaled < 0.2 * loss(nearest(weight, 32) - weight, hessian)
    assert scaled < plain


def test_one_factor_serves_all_scales():
    """Rounding by steps that differ by input is GPTQ of the scaled weight for the scaled Hessian."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator) * torch.linspace(4, 1, 32)
    weight, hessian = torch.randn(8, 32, generator=generator), x.T @ x / 256
    scale = torch.linspace(1.3, 1, 32)  # does not change the order of columns
    wanted = gptq(weight * scale, hessian / scale / scale[:, None], SETTINGS, 0.0)
    found = Rounding(hessian, SETTINGS, 0.0).round(weight, scale)
    torch.testing.assert_close(found.scales, wanted.scales, rtol=1e-2, atol=0)
    assert torch.equal(found.zeros, wanted.zeros)
    assert (found.codes != wanted.codes).float().mean() < 0.01


def test_several_scales_at_once_are_those_one_by_one():
    weight, hessian = outliers(64, 16, 0)
    rounding = Rounding(hessian, SETTINGS, 0.01)
    scales = torch.rand(3, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    whole = rounding.carry(weight, scales)
    for at, scale in enumerate(scales):
        assert torch.equal(whole.codes[at * 16 : at * 16 + 16], rounding.carry(weight, scale[None]).codes)
    losses = rounding.losses(weight, whole, scales)
    wanted = loss(rounding.carry(weight, scales[1:2]).dequantize() / scales[1] - weight, hessian)
    assert float(losses[1]) == pytest.approx(wanted, rel=1e-4)


def test_inputs_that_are_alike_are_not_scaled_apart():
    weight = torch.ones(4, 32).cumsum(0)
    rounding = Rounding(torch.eye(32), Settings("awq", 4, 32, False), 0.01)
    assert torch.equal(find_scale(weight, rounding, Fold("x", torch.arange(32))), torch.ones(32))
    dead = Rounding(torch.zeros(32, 32), Settings("awq", 4, 32, False), 0.01)
    assert torch.equal(find_scale(weight, dead, Fold("x", torch.arange(32))), torch.ones(32))


def hessian_of(block, name, run):
    seen = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    run()
    handle.remove()
    return seen[0].T @ seen[0] / len(seen[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt"])
def test_scaling_keeps_what_a_block_computes_and_halves_the_error_of_rounding_to_the_nearest(family):
    given = block_of(family)
    folds = find_folds(given.block, given.groups, given.together, given.alone)
    awq = Awq(Settings("awq", 4, 16, False), 0.01)
    assert isinstance(awq, ScalingQuantizer)
    output = given.together()
    original = {name: given.block.get_submodule(name).weight.clone() for group in given.groups for name in group}
    made, scales = {}, []
    for fold, group in zip(folds, given.groups, strict=True):
        layers = {name: given.block.get_submodule(name) for name in group}
        before = given.together()
        inputs = Inputs(24, hessian_of(given.block, group[0], given.together))
        found, scale = awq.quantize_scaled(given.block, layers, inputs, fold, made, torch.float32)
        scales.append(scale)
        torch.testing.assert_close(given.together(), before, rtol=1e-2, atol=1e-3 * float(output.abs().max()))
        for name, weight in found.items():
            layers[name].weight.data = weight.dequantize()
        made |= found
    assert sum(bool((scale != 1).any()) for scale in scales) >= 2
    assert all(torch.equal(given.block.get_submodule(name).weight, weight.dequantize()) for name, weight in made.items())
    error = (given.together() - output).square().mean()
    given = block_of(family)
    for name, weight in original.items():
        given.block.get_submodule(name).weight.data = nearest(weight.data, 16)
    assert error < 0.5 * (given.together() - output).square().mean()


def test_experts_that_got_no_token_are_rounded_all_the_same():
    layer = nn.Linear(32, 8, bias=False)
    found = Awq(SETTINGS, 0.01).quantize({"x": layer}, Inputs())["x"]
    assert (found.dequantize() - layer.weight).abs().max() < 0.02
