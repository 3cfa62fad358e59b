"""State that a forward reads beside parameters and settings; zeros and views that look like others."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.fixed import FixedArchitecture
from nascompile.mutables import LayerChoice


class Base(nn.Module):
    """Two linear candidates; subclasses say what happens to their output."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4)], key="choice")
        self.array = numpy.array([1.0])
        self.count = torch.zeros(1)
        self.counts = [torch.zeros(1)]
        self.position = nn.Parameter(torch.randn(1, 3, 4))


class ClassAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.choice(x) * self.scale


class Array(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.choice(x) * float(self.array[0])


class PlainTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.choice(x) * self.count


class TensorInList(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.counts[0].add_(1)
        return self.choice(x) * (2 if float(self.counts[0]) > 1 else 1)


def change_nothing(model: Any) -> None:
    """The forward itself changes the state."""


def change_array(model: Any) -> None:
    model.array[0] += 1


def change_class(model: Any) -> None:
    type(model).scale = 3.0


@pytest.fixture(autouse=True)
def unchanged_class() -> Any:
    yield
    if "scale" in ClassAttribute.__dict__:
        del ClassAttribute.scale


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (ClassAttribute, change_class),
        (Array, change_array),
        (PlainTensor, change_nothing),
        (TensorInList, change_nothing),
    ],
)
@pytest.mark.parametrize("with_example", [True, False])
def test_state_is_followed(kind: type[Base], change: Any, with_example: bool) -> None:
    x = torch.randn(2, 3, 4)
    eager = kind()
    model = copy.deepcopy(eager)
    for one in (eager, model):
        FixedArchitecture(one, {"choice": 1}).reset()
    compiled = nascompile.compile(model, x if with_example else None)
    for _ in range(3):
        assert torch.equal(compiled(x), eager(x))
        change(eager)
        if type(model).scale == eager.scale:
            change(model)


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Position(Base):
    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Linear(4, 4), Zero()], key="choice")

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(x) + self.position


def test_zeros_that_widen_another_batch_stay() -> None:
    model = Position().eval()
    lean = nascompile.prune(model, {"choice": 1}, torch.randn(1, 3, 4))
    assert lean(torch.randn(5, 3, 4)).shape == (5, 3, 4)


class Ravel(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.choice(x)
        view = torch.ravel(y)
        view += 1
        return y * 2


class ChannelDropout(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout1d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.choice(x)
        dropped = self.drop(y)
        dropped += 1
        return dropped + y


@pytest.mark.parametrize("kind", [Ravel, ChannelDropout])
def test_in_place_through_a_view_reaches_the_lean_network(kind: type[Base]) -> None:
    model = kind().eval()
    x = torch.randn(2, 3, 4)
    lean = nascompile.prune(model, {"choice": 0}, x)
    FixedArchitecture(model, {"choice": 0}).reset()
    assert torch.equal(lean(x), model(x))
    assert lean.meta["nascompile"]["islands"] == {}


class Unknown(nn.Module):
    """An in-place change that only a comparison finds: the alias is made by a function of unknown nature."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4)], key="choice")

    def forward(self, x: Tensor) -> Tensor:
        y = self.choice(x)
        view = torch.ops.aten.alias(y)
        view += 1
        return y * 2


def test_a_lean_network_is_compared_with_its_supernet() -> None:
    model = Unknown().eval()
    x = torch.randn(2, 3, 4)
    lean = nascompile.prune(model, {"choice": 0}, x)
    FixedArchitecture(model, {"choice": 0}).reset()
    assert torch.equal(lean(x), model(x))
    assert "other values" in lean.meta["nascompile"]["islands"][""]
