"""Sums over places, by hand."""

import math

import pytest
import torch

from swift.quantize.measure import Tally


def test_predictions_that_are_all_unlikely_have_a_divergence_too():
    """2,048 equal ones are less likely than e^-6.9 each: there is no difference to look for, which is no mistake."""
    tally = Tally()
    even = torch.full((3, 2048), -math.log(2048))
    tally.add(even, even, [1, 2, 3])
    found = tally.result("x")
    assert (found.kl, found.largest_difference, found.same_token) == (0, 0, 1)
    assert found.perplexity_before == pytest.approx(2048, rel=1e-4)
