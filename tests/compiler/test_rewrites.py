"""Each rewrite inside plans is exact, and does something: without it the result is the same, the plan is
not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.region import region
from nascompile.compiler.region.execution import Execution
from nascompile.compiler.region.executors import NATIVE, REFERENCE
from nascompile.compiler.region.flags import WITH_PARAMETERS, WITHOUT_PARAMETERS
from nascompile.compiler.region.rewrites import REWRITES
from nascompile.darts import DartsMutator
from nascompile.mutables import InputChoice, LayerChoice


@pytest.fixture(autouse=True)
def plans_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "EXECUTORS", (NATIVE, REFERENCE))


def edge() -> LayerChoice:
    def separable() -> nn.Module:
        return nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )

    pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(8))
    return LayerChoice([pooled, separable(), separable(), nn.Identity()])


class Cell(nn.Module):
    """Two nodes, the first read by the second, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.ModuleList(edge() for _ in range(4))
        self.both = InputChoice(n_candidates=3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.edges[0](x)
        second = self.both([self.edges[1](x), self.edges[2](first), self.edges[3](x)])
        return torch.cat([first, second], 1)


def results(skip: tuple[str, ...]) -> tuple[list[Tensor], str]:
    torch.manual_seed(0)
    model = Cell().double()
    mutator = DartsMutator(model)
    mutator.reset()
    compiled = nascompile.compile(model, skip=skip)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    out = compiled(x)
    out.sin().sum().backward()
    gradients = [p.grad for p in (x, *model.parameters(), *mutator.parameters()) if p.grad is not None]
    return [out.detach(), *gradients, *model.buffers()], compiled.plans


@pytest.mark.parametrize("name", REWRITES)
def test_a_rewrite_is_exact_and_changes_the_plan(name: str) -> None:
    expected, plan = results(())
    actual, other = results((name,))
    assert len(actual) == len(expected)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert other != plan


def test_gradients_of_decisions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[frozenset[Any]] = []
    original = Execution.flags

    def noted(self: Execution, chosen: frozenset[Any]) -> Any:
        flags.append(chosen)
        return original(self, chosen)

    monkeypatch.setattr(Execution, "flags", noted)
    torch.manual_seed(0)
    model = Cell().double()
    mutator = DartsMutator(model)
    compiled = nascompile.compile(model)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)

    def loss() -> Tensor:
        mutator.reset()
        return compiled(x).sin().sum()

    alphas, weights = list(mutator.parameters()), list(model.parameters())

    def gradients(of: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], set[Any]]:
        flags.clear()
        return torch.autograd.grad(loss(), of), set().union(*flags)

    everything, used = gradients([*alphas, *weights])
    assert WITH_PARAMETERS in used
    alone, used = gradients(alphas)
    assert WITHOUT_PARAMETERS in used
    assert WITH_PARAMETERS not in used
    last, used = gradients(weights[-1:])
    assert WITH_PARAMETERS in used
    for one, two in zip((*alone, *last), (*everything[: len(alphas)], everything[-1]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_plans_are_shown_with_shapes_bytes_and_flops() -> None:
    _, text = results(())
    assert "region_0: plan for 2 images" in text
    assert "9 taps depthwise + pointwise" in text
    assert "MiB" in text or "KiB" in text
    assert "GFLOP" in text
    assert "8x6x6" in text
