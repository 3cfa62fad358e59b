"""The images of a population, computed ahead by one plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler import ahead
from nascompile.compiler.population import Population
from nascompile.compiler.region import region
from nascompile.compiler.region.executors import NATIVE
from nascompile.compiler.region.region import Region
from nascompile.mutables import LayerChoice
from tests.comparing import assert_same
from tests.compiler.populations import SPACES, Architecture, drawn, one_at_a_time, together
from tests.compiler.region_steps import fp64_plans


class Images(nn.Module):
    """Two choices on images and a head; what is between them only eager code understands."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = (
            LayerChoice([nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Identity()], key=key)
            for key in ("first", "second")
        )
        self.between = between or nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.between(self.first(x))))
        return self.head(x.mean((2, 3)))


ARCHITECTURES: list[Architecture] = [{"first": a, "second": b} for a in (0, 1) for b in (0, 1, 2)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each run of a region had."""
    seen: list[int] = []
    original: Any = Region.__call__

    def call(self: Region, *tensors: Tensor) -> Any:
        seen.append(tensors[0].shape[0])
        return original(self, *tensors)

    monkeypatch.setattr(Region, "__call__", call)
    return seen


@pytest.fixture(autouse=True)
def in_fp64() -> Iterator[None]:
    """The tests run plans in fp64, by their reference."""
    with fp64_plans():
        yield


@torch.no_grad()
def assert_close(
    model: nn.Module, architectures: list[Architecture], *args: Any, **options: Any
) -> Population:
    model.double().eval()
    args = tuple(arg.double() for arg in args)
    expected = one_at_a_time(model, architectures, *args)
    population = Population(model, architectures, **options)
    for _ in range(2):
        assert_same(together(population, *args), expected)
    return population


@pytest.mark.parametrize("name", ["darts", "nasbench201"])
def test_published_spaces_have_a_plan(name: str, runs: list[int]) -> None:
    model = SPACES[name]()
    population = assert_close(model, drawn(model, 5), torch.randn(2, 3, 16, 16))
    assert runs == [2, 2]
    assert population.notes == []


def test_a_large_batch_runs_in_pieces_of_one_size(runs: list[int]) -> None:
    size = ahead.IMAGES * torch.get_num_threads()
    assert_close(Images(), ARCHITECTURES, torch.randn(2 * size + 3, 3, 4, 4))
    assert runs == [size] * 6


def test_less_memory_means_fewer_images_and_none_means_no_plan(runs: list[int]) -> None:
    x = torch.randn(4, 3, 4, 4)
    population = assert_close(Images(), ARCHITECTURES, x)
    (plan,) = population._plans.values()
    assert plan._ahead is not None
    with torch.no_grad():
        needs = plan._ahead._region.memory(x.double())
    assert needs is not None
    runs.clear()
    population = assert_close(Images(), ARCHITECTURES, x, memory=needs - 1)
    assert runs == [2] * 4
    assert population.notes == []
    runs.clear()
    population = assert_close(Images(), ARCHITECTURES, x, memory=1)
    assert runs == []
    (note,) = population.notes
    assert note.startswith("runs layer by layer: one image needs ")
    assert note.endswith(" bytes, memory is 1")


def test_what_plans_do_not_understand_is_computed_after_them(runs: list[int]) -> None:
    population = assert_close(Images(nn.Softplus()), ARCHITECTURES, torch.randn(2, 3, 4, 4))
    (plan,) = population._plans.values()
    assert plan._ahead is not None
    assert any("Softplus" in why for why in plan._ahead.why.values())
    assert runs == [2, 2]


def test_a_region_without_a_plan_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "EXECUTORS", (NATIVE,))
    population = assert_close(Images(), ARCHITECTURES, torch.randn(2, 3, 4, 4))
    assert "there is no plan for images in torch.float64" in population.notes[0]


def test_asked_for_exactly(runs: list[int]) -> None:
    population = assert_close(Images(), ARCHITECTURES, torch.randn(2, 3, 4, 4), exact=True)
    assert population.notes == ["runs layer by layer: the eager model's very bits are asked for"]
    assert runs == []


def test_train_mode_and_gradients_have_no_plan(runs: list[int]) -> None:
    model, x = Images().double(), torch.randn(2, 3, 4, 4).double()
    population = Population(model.train(), ARCHITECTURES)
    with torch.no_grad():
        together(population, x)
    assert population.notes == ["runs layer by layer: the model is in train mode"]
    model.eval()
    together(population, x)
    assert population.notes[1:] == ["runs layer by layer: gradients are enabled"]
    assert runs == []
    with torch.no_grad():
        assert_same(together(population, x), one_at_a_time(model, ARCHITECTURES, x))
    assert runs == [2]


def test_a_wrong_plan_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = Region.__call__

    def call(self: Region, *tensors: Tensor) -> Any:
        return [2 * one for one in original(self, *tensors)]

    monkeypatch.setattr(Region, "__call__", call)
    population = assert_close(Images(), ARCHITECTURES, torch.randn(2, 3, 4, 4))
    assert population.notes == ["runs layer by layer: the plan gives other values than the model"]


def test_weights_and_statistics_are_read_in_every_call() -> None:
    model, x = Images().double().eval(), torch.randn(2, 3, 4, 4).double()
    population = Population(model, ARCHITECTURES)
    with torch.no_grad():
        before = together(population, x)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
        after = together(population, x)
        assert not torch.equal(before[0], after[0])
        assert_same(after, one_at_a_time(model, ARCHITECTURES, x))
