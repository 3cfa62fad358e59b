"""Regions that run in parts: what only a call can tell, and what becomes of it when it changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import LayerChoice
from tests.comparing import Decided, assert_close, assert_same, step
from tests.compiler.region_models import SepConv, Unit
from tests.compiler.region_steps import fp64_plans, regions


@pytest.fixture(autouse=True)
def plans_in_fp64() -> Iterator[None]:
    with fp64_plans():
        yield


class Places(nn.Module):
    """Adds an input between choices, and after the last one its mean over rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.two = LayerChoice([Unit("acb", 8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.01))])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.two(self.one(x) + y)
        return torch.tanh(z + z.mean((2, 3), keepdim=True))


class Both:
    """The model eagerly and compiled, the same weights in both."""

    def __init__(self, make: type[Places] = Places) -> None:
        torch.manual_seed(0)
        self.eager: Any = make().double()
        self.model: Any = copy.deepcopy(self.eager)
        self.compiled = nascompile.compile(self.model)
        self.mutators = [Decided(self.eager), Decided(self.model)]

    def steps(self, count: int, compiled: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """A step of both with the second input for so many samples."""
        found = []
        models = (self.eager, self.compiled if compiled is None else compiled)
        for model, mutator in zip(models, self.mutators, strict=True):
            generator = torch.Generator().manual_seed(count)
            masks = {
                key: torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
                for key in mutator.choices_by_key
            }
            mutator.decide(masks)
            x, y = (
                torch.randn(n, 8, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
                for n in (3, count)
            )
            found.append(step(model, masks, (x, y), {}))
        return found[0], found[1]

    @property
    def notes(self) -> str:
        return " ".join(note for entry in self.compiled.entries for note in entry.notes.values())


def test_every_call_has_its_parts() -> None:
    both = Both()
    reasons = {1: "y is not an image of the batch", 3: "a sum broadcasts"}
    # where one sample is for all, a plan has a choice for itself; else it has both, and y
    inputs = {1: {1}, 3: {1, 2}}
    for count in (1, 3, 1, 3):
        assert_same(*both.steps(count))
        assert f"in parts: {reasons[count]}" in both.notes
        (region,) = regions(both.compiled)
        if count in inputs:
            assert {len(plan.graph.sources) for plan in region.plans} == inputs.pop(count)
    plans = len(region.plans)
    assert_same(*both.steps(1))
    assert len(region.plans) == plans


class Added(Places):
    """As Places, without what no size allows."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.two(self.one(x) + y)


def test_notes_are_about_the_last_call() -> None:
    both = Both(Added)
    for count in (3, 1, 3, 1, 3):
        assert_same(*both.steps(count))
        assert ("y is not an image of the batch" in both.notes) == (count == 1)
    assert both.compiled.notes == {}
    # a part says what holds for itself, as long as there are parts
    both = Both()
    both.steps(1)
    before = both.compiled.notes
    assert "hooks on saved tensors" not in both.notes
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        both.steps(1)
    assert "hooks on saved tensors" in both.notes
    both.steps(1)
    assert both.compiled.notes == before


def test_gradients_of_gradients_through_parts() -> None:
    both, found = Both(), []
    both.steps(1)
    for model in (both.eager, both.compiled):
        x = torch.linspace(-1, 1, 480, dtype=torch.float64).sin().view(3, 8, 5, 4).requires_grad_()
        y = torch.linspace(1, 2, 160, dtype=torch.float64).view(1, 8, 5, 4).requires_grad_()
        (first,) = torch.autograd.grad(model(x, y).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, y]))
    assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)
    assert "in parts" in both.notes


def test_a_copy_has_parts_of_its_own() -> None:
    both = Both()
    both.steps(1)
    other = copy.deepcopy(both.compiled)
    other.two[0].conv.weight.data.zero_()
    assert_same(*both.steps(1))
    assert regions(both.compiled)[0].plans


def test_settings_for_which_a_choice_stays_outside_are_watched() -> None:
    both = Both()
    for slope, outside in ((0.2, 1), (0.01, 0), (0.3, 1)):
        for model in (both.eager, both.model):
            model.two[1][1].negative_slope = slope
        assert_same(*both.steps(3))
        gm = both.compiled.entries[-1].graph_module
        assert gm is not None
        assert len(gm.meta.get("outside", {})) == outside
