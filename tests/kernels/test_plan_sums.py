"""The sums of the reference executor: plain ones, and what a BatchNorm makes of maps far from zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nascompile.kernels.plan.state import Sums
from tests import numerics

CHANNELS = 8
MEAN = 1e4


def images(deviation: float) -> tuple[Tensor, Tensor]:
    """Two parts of a batch of maps around MEAN; the second has a mean of its own."""
    first, second = torch.randn(2, 2, 3, 5, CHANNELS, dtype=torch.float64) * deviation
    return MEAN + first, MEAN + 2 * deviation + second


@pytest.mark.parametrize("deviation", [0.0, 1e-6, 1e-3, 1.0])
def test_variance_has_the_digits_of_the_deviation(deviation: float) -> None:
    sums, parts = Sums(3 * CHANNELS), images(deviation)
    for part in parts:
        sums.add(CHANNELS, part)
        sums.add_squares(2 * CHANNELS, part)
    batch = torch.cat(parts)
    elements = batch[..., 0].numel()
    mean = sums.total(CHANNELS, CHANNELS) / elements
    found = sums.variance(2 * CHANNELS, mean, elements)
    # a difference without rounding
    expected = (batch - MEAN).var((0, 1, 2), correction=0)
    # what a rounding error of the mean does
    rounding = torch.finfo(torch.float64).eps * MEAN
    allowed = 1e-12 * expected + rounding * (rounding + 4 * deviation)
    assert bool(((found - expected).abs() <= allowed).all()), found - expected
    plain = torch.stack([torch.zeros(CHANNELS), batch.sum((0, 1, 2)), batch.square().sum((0, 1, 2))])
    numerics.assert_close(sums.plain, plain.flatten())


@pytest.mark.parametrize("deviation", [0.0, 1e-6, 1e-3, 1.0])
def test_products_about_the_mean_have_the_digits_of_the_deviation(deviation: float) -> None:
    sums, parts = Sums(2 * CHANNELS), images(deviation)
    weights = [torch.rand_like(part) for part in parts]
    for weight, part in zip(weights, parts, strict=True):
        sums.add_products(CHANNELS, weight, part)
    batch, weight = torch.cat(parts), torch.cat(weights)
    mean = batch.mean((0, 1, 2))
    centred = weight * (batch - mean)
    found = sums.products(CHANNELS, mean)
    # what a rounding error of the mean does
    rounding = torch.finfo(torch.float64).eps * MEAN * weight.sum((0, 1, 2))
    allowed = 1e-12 * centred.abs().sum((0, 1, 2)) + rounding
    assert bool(((found - centred.sum((0, 1, 2))).abs() <= allowed).all()), found
    plain = torch.stack([torch.zeros(CHANNELS), (weight * batch).sum((0, 1, 2))])
    numerics.assert_close(sums.plain, plain.flatten())


def test_sums_of_what_is_not_finite_are_those_of_torch() -> None:
    value = torch.ones(1, 1, 2, 3, dtype=torch.float64)
    value[0, 0, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    sums = Sums(3)
    sums.add_products(0, torch.ones_like(value), value)
    numerics.assert_identical(sums.products(0, torch.zeros(3)), value.sum((0, 1, 2)))
