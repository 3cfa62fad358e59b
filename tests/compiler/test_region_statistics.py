"""BatchNorms over maps far from zero, in fp64 by the reference: as many digits as eager mode has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import LayerChoice
from tests import numerics
from tests.comparing import Decided, decision, step
from tests.compiler.region_models import pool_bn
from tests.compiler.region_steps import fp64_plans, regions

CHANNELS = 8
MEAN = 100.0
"""Of the images."""


class Gated(nn.Module):
    """A map times a gate of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.pool(x) - MEAN)


def _norm() -> nn.Module:
    return nn.BatchNorm2d(CHANNELS)


CANDIDATES: dict[str, Callable[[], nn.Module]] = {
    "loaded": _norm,
    "dense": lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), _norm()),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, groups=CHANNELS), _norm()),
    "pooled": lambda: pool_bn(nn.AvgPool2d(3, 1, 1, count_include_pad=False), CHANNELS),
    "largest": lambda: pool_bn(nn.MaxPool2d(3, 1, 1), CHANNELS),
    "activated": lambda: nn.Sequential(_norm(), nn.SiLU(), nn.Conv2d(CHANNELS, CHANNELS, 1)),
    "gated": lambda: nn.Sequential(Gated(), _norm()),
}
DEVIATIONS = [*((name, 1e-4) for name in CANDIDATES), ("dense", 0.0), ("depthwise", 0.0)]
"""Those of the images; what is convolved is never quite constant."""


class Net(nn.Module):
    """A choice between a candidate and its input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = LayerChoice([CANDIDATES[name](), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _step(
    name: str, deviation: float, *, compiled: bool = False, roundings: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Outputs and gradients of images, which have so many rounding errors more than they need."""
    torch.manual_seed(0)
    model: nn.Module = Net(name).double()
    mutator = Decided(model)
    masks = decision({key: [0.75, 0.5] for key in mutator.choices_by_key})
    mutator.decide(masks)
    x = MEAN + deviation * torch.randn(3, CHANNELS, 5, 4, dtype=torch.float64)
    x = x * (1 + roundings * torch.finfo(x.dtype).eps / 2 * (2 * torch.rand_like(x) - 1))
    with fp64_plans():
        trained = nascompile.compile(model) if compiled else model
        seen = step(trained, masks, (x.requires_grad_(),), {})
    if isinstance(trained, nascompile.CompiledModel):
        assert all(one.plans for one in regions(trained))
    return seen["outputs"], seen["inputs"][0]


@pytest.mark.parametrize(("name", "deviation"), DEVIATIONS)
def test_norms_of_maps_far_from_zero(name: str, deviation: float) -> None:
    """Plain sums of squares and products would leave errors many times those of the images' rounding."""
    exact, rounded = _step(name, deviation), _step(name, deviation, roundings=8)
    for actual, reference, right in zip(_step(name, deviation, compiled=True), rounded, exact, strict=True):
        numerics.assert_closer(actual, reference, right)
