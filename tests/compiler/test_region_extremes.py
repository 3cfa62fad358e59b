"""Activations of regions at infinities, nan, zeros, denormals and large numbers: as in eager mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import LayerChoice
from tests.comparing import Decided
from tests.compiler.region_steps import fp64_plans, regions
from tests.kernels.plan_memory import instruction_set

__all__ = ["instruction_set"]

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.SiLU,
    nn.Sigmoid,
    nn.GELU,
    nn.LeakyReLU,
    nn.ELU,
    nn.PReLU,
)
SPECIAL = (math.inf, math.nan, 0.0, 1e-45, 1e-40, 1e-30, 1e-9, 1e-4, 0.5, 1.0, 3.0, 5.5, 6.0, 9.0, 14.0)
LARGE = (87.0, 88.2, 88.5, 89.0, 104.0, 1e4, 1e19, 1e20, 3e37)
VALUES = [sign * value for value in SPECIAL + LARGE for sign in (1.0, -1.0)]

# 1.5e-7 is the error of the normal distribution, 6e-8 that of 1 - sigmoid; elsewhere what is tiny may be zero
ABSOLUTE: dict[Any, float] = {nn.GELU: 4e-7, nn.Sigmoid: 1e-7, nn.SiLU: 4e-7}


class Net(nn.Module):
    """An activation that is stored, or that a convolution with ones reads."""

    def __init__(self, act: nn.Module, *, staged: bool) -> None:
        super().__init__()
        count = len(VALUES)
        last = nn.Conv2d(count, count, 1, groups=count, bias=False) if staged else nn.Identity()
        for weight in last.parameters():
            nn.init.ones_(weight)
        self.op = LayerChoice([nn.Sequential(act, last), nn.Sequential(nn.MaxPool2d(1), nn.Sigmoid())])

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _images(dtype: torch.dtype) -> Tensor:
    # through fp32, so that all types have the same numbers; as many pixels as torch takes together
    values = torch.tensor(VALUES).to(dtype)
    return values.view(1, -1, 1, 1).repeat(2, 1, 8, 8).requires_grad_()


def _step(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return y.detach()[0, :, 0, 0].double(), x.grad[0, :, 0, 0].double()


def _decided(make: Callable[[], nn.Module], dtype: torch.dtype, *, staged: bool) -> nn.Module:
    model = Net(make(), staged=staged).to(dtype)
    Decided(model).decide({model.op.key: torch.tensor([True, False])})
    return model


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", ACTIVATIONS, ids=lambda make: make.__name__)
def test_activations_at_the_ends_of_the_numbers(
    make: Callable[[], nn.Module], dtype: torch.dtype, staged: bool, instruction_set: str
) -> None:
    expected = _step(_decided(make, torch.float64, staged=staged), _images(torch.float64))
    with fp64_plans() if dtype == torch.float64 else nullcontext():
        # what is compared with the program on the first call are plain numbers
        compiled = nascompile.compile(
            _decided(make, dtype, staged=staged), torch.ones(2, len(VALUES), 8, 8).to(dtype)
        )
        actual = _step(compiled, _images(dtype))
    (region,) = regions(compiled)
    assert len(region.plans) == 2
    for one, right in zip(actual, expected, strict=True):
        for value, mine, theirs in zip(VALUES, one.tolist(), right.tolist(), strict=True):
            close = math.isclose(mine, theirs, rel_tol=2e-6, abs_tol=ABSOLUTE.get(make, 1e-36))
            assert close or (math.isnan(mine) and math.isnan(theirs)), (value, mine, theirs)


@pytest.mark.parametrize("staged", [False, True])
def test_slopes_at_the_ends_of_the_numbers(staged: bool, instruction_set: str) -> None:
    """The gradient of each channel's slope, of numbers whose sums fp32 can hold."""

    def gradients(model: Any, dtype: torch.dtype) -> list[float]:
        y = model(_images(dtype))
        y.backward(torch.full_like(y, 2.0**-10))
        (slopes,) = (module.weight for module in model.modules() if isinstance(module, nn.PReLU))
        assert slopes.grad is not None
        return slopes.grad.tolist()

    def make() -> nn.Module:
        return nn.PReLU(len(VALUES))

    expected = gradients(_decided(make, torch.float64, staged=staged), torch.float64)
    model = _decided(make, torch.float32, staged=staged)
    compiled = nascompile.compile(model, torch.ones(2, len(VALUES), 8, 8))
    for value, mine, theirs in zip(VALUES, gradients(compiled, torch.float32), expected, strict=True):
        close = math.isclose(mine, theirs, rel_tol=2e-6, abs_tol=1e-36)
        assert close or (math.isnan(mine) and math.isnan(theirs)), (value, mine, theirs)
    assert regions(compiled)[0].plans


class Pools(nn.Module):
    """A maximum beside an average."""

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@pytest.mark.parametrize("value", [3e38, -3e38, math.inf])
def test_gradients_of_decisions_on_large_maps(value: float, instruction_set: str) -> None:
    found = []
    for compile_it in (True, False):
        model: Any = Pools()
        weights = torch.tensor([0.5, 0.25]).requires_grad_()
        Decided(model).decide({model.op.key: weights})
        if compile_it:
            model = nascompile.compile(model, torch.ones(2, 8, 6, 6))
        y = model(torch.full((2, 8, 6, 6), value).requires_grad_())
        y.backward(torch.full_like(y, 1e-3))
        found.append(weights.grad)
        assert not compile_it or regions(model)[0].plans
    torch.testing.assert_close(*found)
    assert not found[0].isnan().any()
