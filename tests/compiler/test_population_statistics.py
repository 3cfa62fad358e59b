"""BatchNorm statistics of a population are those of its architectures, one at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nascompile.compiler.population import Population
from nascompile.fixed import FixedArchitecture
from nascompile.mutables import LayerChoice
from tests.comparing import assert_same
from tests.compiler.populations import SPACES, Architecture, drawn, fresh, together


@torch.no_grad()
def calibrated_alone(model: nn.Module, architecture: Architecture, calls: list[tuple[Any, ...]]) -> nn.Module:
    """The definition: a copy, BatchNorm in training mode with plain averages, one architecture."""
    clone = copy.deepcopy(model).eval()
    mutator = FixedArchitecture(clone, architecture)
    mutator.reset()
    norms = [m for m in clone.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for args in calls:
        clone(*fresh(args))
    return clone.eval()


@torch.no_grad()
def assert_calibrated(
    model: nn.Module, architectures: list[Architecture], *calls: tuple[Any, ...], memory: int = 2**30
) -> Population:
    model.eval()
    before = copy.deepcopy(model.state_dict())
    population = Population(model, architectures, memory=memory)
    population.calibrate((args, {}) for args in calls)
    for args in calls[:2]:
        expected = [calibrated_alone(model, a, list(calls))(*fresh(args)) for a in architectures]
        assert_same(together(population, *args), expected, exact=True)
    assert_same(dict(model.state_dict()), dict(before), exact=True)
    assert not any(module.training for module in model.modules())
    return population


@pytest.mark.parametrize("name", ["darts", "nasbench201", "mbconv"])
def test_calibrated_published_spaces(name: str) -> None:
    model = SPACES[name]()
    calls = [(torch.randn(4, 3, 16, 16),) for _ in range(3)]
    population = assert_calibrated(model, drawn(model, 4), *calls)
    assert not population.apart


@pytest.mark.parametrize("memory", [0, 2**30])
def test_statistics_follow_what_comes_before(memory: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="a")
            self.norm = nn.BatchNorm1d(4)
            self.b = LayerChoice([nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4)], key="b")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))

    model = Model()
    architectures: list[Architecture] = [{"a": a, "b": b} for a in (0, 1) for b in (0, 1)]
    calls = [(torch.randn(5, 4),) for _ in range(3)]
    population = assert_calibrated(model, architectures, *calls, memory=memory)
    (plan,) = population._plans.values()
    # norm after a.0 and after a.1, b.0 after each of them
    assert len(plan.space.statistics) == 4


def test_a_batch_norm_called_twice_belongs_to_one_architecture() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.op = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.op(self.norm(x)))

    population = assert_calibrated(Model(), [{"op": 0}, {"op": 1}], *[(torch.randn(5, 4),) for _ in range(2)])
    assert len(population.apart) == 2


def test_calibrated_islands() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.island = Branching()
            self.op = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.op(self.island(x))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.op = LayerChoice([nn.BatchNorm1d(4), nn.Tanh()], key="inner")

        def forward(self, x: Tensor) -> Tensor:
            y = self.op(self.norm(x))
            return self.norm(y) if y.sum() > 100 else self.norm(-y)

    architectures: list[Architecture] = [{"inner": i, "op": o} for i in (0, 1) for o in (0, 1)]
    population = assert_calibrated(Model(), architectures, *[(torch.randn(5, 4),) for _ in range(2)])
    assert not population.apart
