"""A model with a region and its compiled twin, to be changed and stepped side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import InputChoice, LayerChoice
from tests.comparing import Decided, assert_same, step
from tests.compiler.region_models import Case, MBConv, SepConv, Unit
from tests.compiler.region_steps import build, decide, images, regions


class Net(nn.Module):
    """What the tests of this file change: `op` is a choice of three, before and after it are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.op = LayerChoice([Unit("acb", 8), SepConv(8, 3), MBConv(8, 3, 2)])
        self.end = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.op(self.stem(x)))


class Unreached(nn.Module):
    """Of two edges the decision may leave out one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.choose = InputChoice(n_candidates=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.choose([self.one(x), self.two(x)])


NET = Case("net", Net)


class Pair:
    """The model itself and its compiled form, the same weights in both."""

    def __init__(
        self,
        change: Callable[[Any], Any] | None = None,
        dtype: torch.dtype = torch.float64,
        case: Case = NET,
    ) -> None:
        self.dtype = dtype
        self.eager: Any = build(case, dtype)
        self.model: Any = build(case, dtype)
        if change is not None:
            change(self.eager)
            change(self.model)
        self.compiled = nascompile.compile(self.model)
        self.mutators = [Decided(self.eager), Decided(self.model)]

    def change(self, change: Callable[[Any], Any]) -> None:
        """Do the same to both models."""
        for model in (self.eager, self.model):
            change(model)

    def each(self, act: Callable[[Any, Any], Any], kind: str = "soft") -> list[Any]:
        """`act(model, masks)` on both, after the decision."""
        return [
            act(model, decide(mutator, kind, self.dtype))
            for model, mutator in zip((self.eager, self.compiled), self.mutators, strict=True)
        ]

    def assert_same_steps(self, *, batch: int = 3, kinds: tuple[str, ...] = ("soft", "one", "some")) -> None:
        for kind in kinds:
            inputs = images(NET, self.dtype, seed=len(kind), batch=batch)
            expected, actual = self.each(lambda model, masks, i=inputs: step(model, masks, i, {}), kind)
            assert_same(actual, expected)

    @property
    def plans(self) -> int:
        return sum(len(found.plans) for found in regions(self.compiled))

    def assert_planned(self) -> None:
        """The compiled model has plans and nothing keeps them from running."""
        assert self.plans
        assert self.compiled.islands == []
        assert not self.notes

    @property
    def notes(self) -> str:
        return " ".join(self.compiled.notes.values())
