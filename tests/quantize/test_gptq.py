"""GPTQ beside the same rule written without blocks and factors, and what it is for: a smaller error of the output."""

import pytest
import torch
from torch import nn

from swift.errors import ModelError
from swift.model.quantized.base import GroupedWeight, Settings
from swift.quantize.base import Inputs
from swift.quantize.gptq import Gptq, gptq, inverse_factor, round_columns
from swift.quantize.grid import find_grid, round_to, round_to_nearest
from swift.quantize.refine import descend, fit_scales, refine


def layer(outputs: int = 24, inputs: int = 160, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Hessian of inputs that depend on each other and of which some are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x *= torch.rand(inputs, generator=generator) * 3
    x[:, ::37] *= 10
    return torch.randn(outputs, inputs, generator=generator) * 0.02, x.T @ x / len(x)


def loss(weight: torch.Tensor, found: GroupedWeight, hessian: torch.Tensor) -> float:
    gap = found.dequantize() - weight
    return float(((gap @ hessian) * gap).sum())


def test_the_factor_is_that_of_the_damped_inverse():
    _, hessian = layer()
    upper = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    assert torch.allclose(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(len(hessian)), atol=1e-3)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, True), (2, False), (8, True)])
def test_columns_are_rounded_as_by_the_rule_of_optimal_brain_surgery(bits, symmetric):
    """Each column is rounded, and all later weights move by the exact minimum: with the inverse of what is left, made anew each time."""
    weight, hessian = layer(outputs=6, inputs=160)
    scales, zeros = find_grid(weight, bits, 32, symmetric)
    of_columns, zero_of = scales.repeat_interleave(32, 1), zeros.float().repeat_interleave(32, 1)
    found = round_columns(weight, inverse_factor(hessian, 0.01), of_columns, zero_of, 2**bits - 1)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160)).double()
    rest = weight.double().clone()
    wanted = torch.empty_like(found)
    for place in range(160):
        inverse = torch.linalg.inv(damped[place:, place:])
        codes = (rest[:, place] / of_columns[:, place].double() + zero_of[:, place]).round().clamp(0, 2**bits - 1)
        wanted[:, place] = codes.to(torch.uint8)
        error = rest[:, place] - (codes - zero_of[:, place]) * of_columns[:, place].double()
        rest[:, place:] -= (error / inverse[0, 0])[:, None] * inverse[0][None]
    assert (found != wanted).float().mean() < 0.005  # float32 here: a weight between two codes may fall on the other side
    assert (found.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_less_is_lost_than_by_rounding(bits, symmetric, desc_act):
    weight, hessian = layer()
    plain = round_to_nearest(weight, bits, 32, symmetric)
    searched = find_grid(weight, bits, 32, symmetric, hessian.diagonal())
    rounded, best = (
        loss(weight, GroupedWeight(round_to(weight, *grid, bits), *grid, bits, symmetric), hessian) for grid in (plain, searched)
    )
    found = gptq(weight, hessian, Settings("gptq", bits, 32, symmetric, desc_act), 0.01)
    assert loss(weight, found, hessian) < (0.8 if bits == 2 else 0.6) * min(rounded, best)
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) <= 2**bits - 1
    assert torch.equal(found.scales.half().float(), found.scales)
    assert (found.zeros == 2 ** (bits - 1)).all() or not symmetric
    assert (found.groups is not None) == desc_act
    if desc_act:
        assert found.groups.bincount().tolist() == [32] * 5
        assert hessian.diagonal()[found.groups == 0].mean() > hessian.diagonal()[found.groups == 4].mean()


def test_one_group_for_a_row():
    weight, hessian = layer()
    found = gptq(weight, hessian, Settings("gptq", 4, -1), 0.01)
    assert found.scales.shape == (24, 1)
    grid = round_to_nearest(weight, 4, -1, True)
    assert loss(weight, found, hessian) < 0.6 * loss(weight, GroupedWeight(round_to(weight, *grid, 4), *grid, 4, True), hessian)


def test_weights_on_a_grid_stay():
    grid = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(1)).float()
    grid[:, ::32] = -8  # the whole range is used
    weight = grid * 2.0**-6
    found = gptq(weight, layer(inputs=64)[1], Settings("gptq", 4, 32), 0.01)
    assert torch.allclose(found.dequantize(), weight, rtol=1e-3)


def test_scales_of_least_squares_are_those_of_torch():
    weight, hessian = layer(outputs=3, inputs=64)
    scales, zeros = find_grid(weight, 4, 16, True)
    whole = round_to(weight, scales, zeros, 4).float() - 8
    fitted = fit_scales(weight @ hessian, hessian, whole, scales)
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(64), upper=True)
    for row in range(3):
        columns = torch.stack(
            [(root[:, part * 16 : part * 16 + 16] @ whole[row, part * 16 : part * 16 + 16].double()) for part in range(4)], 1
        )
        wanted = torch.linalg.lstsq(columns, (root @ weight[row].double())[:, None]).solution[:, 0]
        assert torch.allclose(fitted[row].double(), wanted, rtol=2e-3)


def test_scales_of_some_rows_at_a_time_are_those_of_all(monkeypatch):
    weight, hessian = layer(outputs=7, inputs=64)
    scales, zeros = find_grid(weight, 4, 16, True)
    whole = round_to(weight, scales, zeros, 4).float() - 8
    wanted = fit_scales(weight @ hessian, hessian, whole, scales)
    monkeypatch.setattr("swift.quantize.refine.LARGEST", 3 * 4**2)
    assert torch.allclose(fit_scales(weight @ hessian, hessian, whole, scales), wanted, rtol=2e-3)


def test_each_step_of_the_descent_is_the_best_of_its_column():
    """After one pass from far away, the last column cannot be bettered by any other code; the loss fell."""
    weight, hessian = layer(outputs=5, inputs=96)
    scales, zeros = find_grid(weight, 3, 32, False)
    start = torch.randint(0, 8, weight.shape, generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    found = GroupedWeight(start, scales, zeros, 3, False)
    offset = zeros.float().repeat_interleave(32, 1)
    whole = descend(weight @ hessian, hessian, start.float() - offset, scales, found)
    after = GroupedWeight((whole + offset).to(torch.uint8), scales, zeros, 3, False)
    assert loss(weight, after, hessian) < 0.1 * loss(weight, found, hessian)
    for code in range(8):
        other = after.codes.clone()
        other[:, -1] = code
        for row in range(5):
            mixed = after.codes.clone()
            mixed[row] = other[row]
            assert loss(weight, after, hessian) <= loss(weight, GroupedWeight(mixed, scales, zeros, 3, False), hessian) * (1 + 1e-5)


def test_refining_never_loses(seeds=range(6)):
    for seed in seeds:
        weight, hessian = layer(seed=seed)
        grid = round_to_nearest(weight, 4, 32, seed % 2 == 0)
        found = GroupedWeight(round_to(weight, *grid, 4), *grid, 4, seed % 2 == 0)
        assert loss(weight, refine(weight, hessian, found), hessian) < loss(weight, found, hessian)


def test_inputs_that_are_always_zero_do_no_harm():
    weight, hessian = layer()
    dead = torch.arange(0, 160, 7)
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = gptq(weight, hessian, Settings("gptq", 4, 32), 0.01)
    assert torch.isfinite(found.dequantize()).all()
    assert torch.isfinite(found.scales).all()


def test_fewer_tokens_than_inputs_are_enough():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 160, generator=generator)
    weight = torch.randn(8, 160, generator=generator)
    found = gptq(weight, x.T @ x / 20, Settings("gptq", 4, 32), 0.01)
    assert torch.isfinite(found.dequantize()).all()
    assert ((found.dequantize() - weight) @ x.T).square().sum() < 0.01 * (weight @ x.T).square().sum()


def test_a_hessian_that_is_no_number_is_said():
    with pytest.raises(ModelError, match="Cholesky"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)


def test_layers_that_share_inputs_are_done_as_if_alone():
    weight, hessian = layer(outputs=30)
    parts = dict(zip("qkv", weight.split([10, 12, 8]), strict=True))
    layers = {}
    for name, part in parts.items():
        layers[name] = nn.Linear(160, len(part), bias=False)
        layers[name].weight = nn.Parameter(part)
    quantizer = Gptq(Settings("gptq", 4, 32), 0.01)
    together = quantizer.quantize(layers, Inputs(10, hessian))
    for name, linear in layers.items():
        alone = quantizer.quantize({name: linear}, Inputs(10, hessian))[name]
        assert torch.allclose(together[name].dequantize(), alone.dequantize(), atol=1e-3)
        assert together[name].codes.shape == parts[name].shape


def test_an_expert_that_got_no_token_is_rounded():
    linear = nn.Linear(64, 8, bias=False)
    made = Gptq(Settings("gptq", 4, 32), 0.01).quantize({"x": linear}, Inputs())["x"]
    assert (made.dequantize() - linear.weight).abs().max() < 0.02
