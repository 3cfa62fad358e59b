"""Sums over pixels on a GPU where a map is far from zero: a BatchNorm needs the digits of the deviation.

test_other_processes.py runs these tests in the interpreter; without it and a GPU they are skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Convolve,
    Gate,
    Map,
    Pool,
    Reduce,
    Step,
    Tap,
    Term,
    Unstage,
)
from tests.kernels.plan_memory import Memory, same
from tests.kernels.plan_triton import sums_of, wide_lanes

__all__ = ["wide_lanes"]

CHANNELS = 32
SIZE = (5, 9)
"""Of two images: a whole tile of 64 pixels and a part of one, for every kernel."""
IMAGES = 2
MEANS = (0.0, 10.0, 100.0, 1000.0)
"""In deviations."""


def around(memory: Memory, mean: float) -> Map:
    """A map of deviation one around means of both signs."""
    place = memory.filled(CHANNELS, SIZE)
    memory.view(place)[:, ::2] += mean
    memory.view(place)[:, 1::2] -= mean
    return place


def convolve(memory: Memory, x: Map, y: Map, moments: int, *, depthwise: bool, dense: bool) -> Step:
    """A convolution with one tap, whose results are those of x: nothing is rounded."""
    taps = (Tap(0, 0),)
    weights = memory.vector(torch.eye(CHANNELS).flatten())
    factors = memory.vector(torch.ones(CHANNELS))
    return Convolve(x, y, 1, 1, taps if depthwise else (), factors, taps if dense else (), weights, moments)


def pool(x: Map, y: Map, moments: int, *, is_max: int) -> Step:
    return Pool(x, y, is_max, 1, 1, 1, 1, 0, 0, 0, NONE, NONE, moments)


def gate(memory: Memory, x: Map, y: Map, moments: int) -> Step:
    ones = memory.filled(CHANNELS, (1, 1))
    memory.view(ones).fill_(1)
    return Gate(x, ones, y, 0, moments)


def combine(x: Map, y: Map, moments: int) -> Step:
    return Combine((Term(x, NONE, NONE),), NONE, Activation.none, y, 0, moments)


STEPS: dict[str, Callable[[Memory, Map, Map, int], Step]] = {
    "depthwise": lambda memory, *places: convolve(memory, *places, depthwise=True, dense=False),
    "dense": lambda memory, *places: convolve(memory, *places, depthwise=False, dense=True),
    "separable": lambda memory, *places: convolve(memory, *places, depthwise=True, dense=True),
    "maximum": lambda _, *places: pool(*places, is_max=1),
    "average": lambda _, *places: pool(*places, is_max=0),
    "gate": gate,
    "combine": lambda _, *places: combine(*places),
}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("step", STEPS)
def test_mean_and_variance_have_the_digits_of_the_deviation(step, mean):
    memory = Memory(images=IMAGES)
    at = memory.summed(2 * CHANNELS)
    x, y = around(memory, mean), memory.map(CHANNELS, SIZE)
    exact = memory.view(x).double()
    elements = exact[:, 0].numel()
    total, squares = sums_of(memory, STEPS[step](memory, x, y, at)).view(2, CHANNELS) / elements
    same(total - exact.mean((0, 2, 3)), torch.zeros(CHANNELS))
    same(squares - total.square(), exact.var((0, 2, 3), correction=0))


def reduce(gradient: Map, x: Map, sums: int) -> Step:
    return Reduce(gradient, (Term(x, sums + CHANNELS, NONE),), sums)


def unstage(gradient: Map, x: Map, sums: int) -> Step:
    return Unstage(gradient, x, NONE, NONE, Activation.none, gradient, 0, sums)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("step", [reduce, unstage])
def test_products_about_the_mean_have_the_digits_of_the_deviation(step, mean):
    memory = Memory(images=IMAGES)
    at = memory.summed(2 * CHANNELS)
    x, gradient = around(memory, mean), memory.filled(CHANNELS, SIZE)
    exact, weight = memory.view(x).double(), memory.view(gradient).double()
    about = exact.mean((0, 2, 3))
    total, products = sums_of(memory, step(gradient, x, at)).view(2, CHANNELS)
    expected = weight * (exact - about[:, None, None])
    same(products - about * total, expected.sum((0, 2, 3)))


EXTREMES = (torch.inf, -torch.inf, torch.nan, -3.4e38)


def extreme(memory: Memory) -> Map:
    """A map whose first channels have one of EXTREMES each."""
    place = around(memory, 0.0)
    # the distance of the last extreme from the mean of its tile, 6e35, has no place in fp32
    memory.view(place)[:, 3] = 6e36
    memory.view(place)[0, : len(EXTREMES), 2, 3] = torch.tensor(EXTREMES)
    return place


def same_extremes(found: Tensor, exact: Tensor) -> None:
    found, expected = found[: len(EXTREMES)], exact.sum((0, 2, 3))[: len(EXTREMES)]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0, equal_nan=True)


# the interpreter computes in NumPy, which says what it meets
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_sums_of_what_is_not_finite_or_too_large_are_those_of_torch():
    memory = Memory(images=IMAGES)
    at = memory.summed(2 * CHANNELS)
    x, y = extreme(memory), memory.map(CHANNELS, SIZE)
    exact = memory.view(x).double()
    same_extremes(sums_of(memory, combine(x, y, at)), exact)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("step", [reduce, unstage])
def test_products_of_what_is_not_finite_or_too_large_are_those_of_torch(step):
    memory = Memory(images=IMAGES)
    at = memory.summed(2 * CHANNELS)
    x, gradient = extreme(memory), memory.filled(CHANNELS, SIZE)
    memory.view(gradient).clamp_(-0.01, 0.01)
    exact = memory.view(gradient).double() * memory.view(x).double()
    same_extremes(sums_of(memory, step(gradient, x, at))[CHANNELS:], exact)
