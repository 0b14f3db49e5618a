"""Grids of few bits, by hand and against an exhaustive search."""

import pytest
import torch

from swift.errors import ConfigError
from swift.model.quantized.base import GroupedWeight
from swift.quantize.grid import find_grid, num_groups, round_to, round_to_nearest


def dequantized(weight, scales, zeros, bits):
    return GroupedWeight(round_to(weight, scales, zeros, bits), scales, zeros, bits, False).dequantize()


def test_weights_on_a_symmetric_grid_are_found_exactly():
    weight = torch.tensor([[-8.0, -3, 0, 1, 2, 5, 6, 7]]) * 0.25
    scales, zeros = find_grid(weight, 4, 8, True)
    assert scales.tolist() == [[0.25]] and zeros.tolist() == [[8]]
    assert round_to(weight, scales, zeros, 4).tolist() == [[0, 5, 8, 9, 10, 13, 14, 15]]


def test_weights_on_a_grid_with_a_zero_point_are_found_exactly():
    weight = torch.tensor([[-2.0, 0, 1, 13]]) * 0.5
    scales, zeros = find_grid(weight, 4, 4, False)
    assert scales.tolist() == [[0.5]] and zeros.tolist() == [[2]]
    assert round_to(weight, scales, zeros, 4).tolist() == [[0, 2, 3, 15]]


def test_zero_points_are_never_below_the_least_that_a_format_holds():
    weight = torch.tensor([[0.0, 4, 15]])
    assert [part.tolist() for part in find_grid(weight, 4, 3, False)] == [[[1.0]], [[0]]]
    scales, zeros = find_grid(weight * 14 / 15, 4, 3, False, torch.tensor([1.0, 0, 1]), least_zero=1)
    assert scales.tolist() == [[1.0]] and zeros.tolist() == [[1]]


def test_each_group_has_its_own_scale():
    weight = torch.tensor([[-8.0, 7, -16, 14], [-4.0, 3.5, -32, 28]])
    assert find_grid(weight, 4, 2, True)[0].tolist() == [[1, 2], [0.5, 4]]
    assert find_grid(torch.tensor([[-16.0, 14, -2, 8]]), 4, -1, True)[0].tolist() == [[2]]


def test_importance_decides_which_weight_is_exact():
    """2 bits hold -2..1 steps: 1.0 and 0.3 are both at most one step of a common scale, which only one can have."""
    weight = torch.tensor([[1.0, 0.3]])
    for importance, index in (([1.0, 0.0001], 0), ([0.0001, 1.0], 1)):
        scales, zeros = find_grid(weight, 2, 2, True, torch.tensor(importance))
        error = (dequantized(weight, scales, zeros, 2) - weight).abs()[0]
        assert error[index] < 0.01 and error[1 - index] > 0.2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_is_near_an_exhaustive_one_and_never_worse_than_the_range(bits, symmetric):
    torch.manual_seed(0)
    weight, importance = torch.randn(16, 64), torch.rand(64)

    def errors(grid):
        return ((dequantized(weight, *grid, bits) - weight).square() * importance).sum(-1)

    found = find_grid(weight, bits, -1, symmetric, importance)
    whole = round_to_nearest(weight, bits, -1, symmetric)
    assert (errors(found) <= errors(whole) * (1 + 1e-5)).all()
    best = torch.full((16,), torch.inf)
    for zero in [2 ** (bits - 1)] if symmetric else range(2**bits) if bits < 8 else range(118, 138):
        for ratio in torch.linspace(0.3, 1.0, 71):
            best = best.minimum(errors((whole[0] * ratio, torch.full((16, 1), zero, dtype=torch.uint8))))
    assert errors(found).sum() < best.sum() * 1.06


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_constant_and_extreme_rows_have_finite_scales(symmetric):
    rows = torch.tensor([0.0, 0.7, -0.7, 1e-12, 1e5, 3e-38])
    weight = rows[:, None].expand(-1, 16).contiguous()
    scales, zeros = find_grid(weight, 4, 8, symmetric)
    assert scales.isfinite().all() and (scales > 0).all() and torch.equal(scales, scales.half().float())
    found = dequantized(weight, scales, zeros, 4)
    torch.testing.assert_close(found[:3], weight[:3], rtol=6e-4, atol=0)
    assert (found[3] == 0).all() and (found[5] == 0).all()
    torch.testing.assert_close(found[4], weight[4], rtol=1e-2, atol=0)


def test_inputs_that_nothing_reached_are_rounded_to_the_nearest():
    weight = torch.tensor([[-8.0, 7, -4, 3.5]])
    for importance in (torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0])):
        assert find_grid(weight, 4, 2, True, importance)[0].tolist() == [[1, 0.5]]


def test_chunks_of_rows_change_nothing(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(33, 64)
    whole = find_grid(weight, 4, 32, False)
    monkeypatch.setattr("swift.quantize.grid.CHUNK", 200)
    assert all(map(torch.equal, whole, find_grid(weight, 4, 32, False)))


def test_groups_that_do_not_fill_a_row_are_refused():
    assert num_groups(96, -1) == 1 and num_groups(96, 32) == 3
    with pytest.raises(ConfigError, match="groups of 64 weights do not fill rows of 96"):
        find_grid(torch.zeros(2, 96), 4, 64, True)
