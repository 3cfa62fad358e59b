"""What people write becomes regions, and a region computes what the model computes: see `region_models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import InputChoice, LayerChoice
from tests import numerics
from tests.comparing import Decided, assert_close, assert_same, step
from tests.compiler import region_layouts, region_models, region_patterns, region_vectors
from tests.compiler.region_models import Case, Nothing, SepConv, Unit
from tests.compiler.region_pairs import Unreached
from tests.compiler.region_steps import (
    assert_regions,
    assert_rounds_closer,
    compiled_of,
    eagerly,
    fp64_plans,
    fresh_memory_is_nan,
    regions,
    train,
)
from tests.kernels.plan_memory import instruction_set

__all__ = ["instruction_set"]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
CASES = (*region_models.CASES, *region_layouts.CASES, *region_patterns.CASES, *region_vectors.CASES)
BY_NAME: Any = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@BY_NAME
def test_equals_eager_in_fp64(case: Case) -> None:
    """Outputs, every gradient, buffers and weights, in training and evaluation, by the reference."""
    expected = eagerly(case, torch.float64)
    with fp64_plans():
        compiled, mutator = compiled_of(case, torch.float64)
        actual = train(compiled, mutator, case, torch.float64)
    assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    assert_regions(compiled, case)


@BY_NAME
def test_as_good_as_eager_in_fp32(case: Case, instruction_set: str) -> None:
    """The same by the native executor, judged against the model in fp64."""
    formats = (torch.contiguous_format, torch.channels_last)
    references = [eagerly(case, torch.float32, layout) for layout in formats]
    compiled, mutator = compiled_of(case, torch.float32)
    with fresh_memory_is_nan():
        actual = train(compiled, mutator, case, torch.float32)
    assert_rounds_closer(actual, references, eagerly(case, torch.float64))
    assert_regions(compiled, case)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "max": lambda: nn.MaxPool2d(3, 1, 1),
    "avg": lambda: nn.AvgPool2d(1, 1),
    "pointwise": lambda: nn.Conv2d(8, 8, 1, bias=False),
    "dense": lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
}


# ----- what single models brought to light


def compared(make: Any, decisions: dict[str, list[Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training step in fp64, compiled and eagerly; the compiled one by a plan."""
    results = []
    for compile_it in (True, False):
        torch.manual_seed(0)
        model = make().double()
        mutator = Decided(model)
        masks = {
            key: torch.tensor(row, dtype=torch.float64, requires_grad=True) for key, row in decisions.items()
        }
        mutator.decide(masks)
        images = torch.randn(2, 8, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with fp64_plans():
            compiled = nascompile.compile(model) if compile_it else model
            results.append(step(compiled, masks, (images,), {}))
        if isinstance(compiled, nascompile.CompiledModel):
            assert compiled.islands == []
            assert compiled.entries[0].regions[0].plans
    return results[0], results[1]


class NormTwice(nn.Module):
    """The first call of the norm waits for another norm, the second does not."""

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([Unit("acba", 8), nn.Identity()])
        self.conv = nn.Conv2d(8, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(self.op(x)))
        return y + self.bn(self.conv(x))


def test_a_norm_called_twice_updates_its_statistics_in_the_order_of_the_program() -> None:
    assert_same(*compared(NormTwice, {"LayerChoice1": [0.5, 0.5]}))


def test_decisions_that_are_not_reached_have_no_gradient() -> None:
    decisions = {"LayerChoice1": [0.5, 0.5], "LayerChoice2": [0.5, 0.5], "InputChoice3": [0.0, 1.0]}
    assert_same(*compared(Unreached, decisions))


class SomeNothing(nn.Module):
    """The decision may choose zeros alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), Nothing(), Nothing()])
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.one(x) + x)


def test_decisions_for_zeros_have_a_gradient_of_zeros() -> None:
    assert_same(*compared(SomeNothing, {"LayerChoice1": [0.0, 0.5, 0.5]}))


class MixedReductions(nn.Module):
    """One decision for a mean and for a sum."""

    def __init__(self, first: str = "mean", second: str = "sum") -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)], reduction=first, key="shared")
        self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)], reduction=second, key="shared")

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize("weights", [[0.5, 0.25], [0.0, 0.75]])
def test_one_decision_for_a_mean_and_a_sum(weights: list[float]) -> None:
    assert_same(*compared(MixedReductions, {"shared": weights}))


@pytest.mark.parametrize("reductions", [("mean", "sum"), ("sum", "mean"), ("mean", "mean")])
def test_second_derivatives_of_a_decision_for_a_mean(reductions: tuple[str, str]) -> None:
    results = []
    for compile_it in (True, False):
        torch.manual_seed(0)
        model = MixedReductions(*reductions).double()
        weights = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
        Decided(model).decide({"shared": weights})
        wanted = [weights, *model.parameters()]
        with fp64_plans():
            compiled = nascompile.compile(model) if compile_it else model
            loss = compiled(torch.randn(2, 8, 5, 4, dtype=torch.float64)).sin().sum()
            first = torch.autograd.grad(loss, wanted, create_graph=True)
            second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), wanted)
        results.append((first, second))
        assert not isinstance(compiled, nascompile.CompiledModel) or regions(compiled)[0].plans
    assert_same(*results)


class TwoRegions(nn.Module):
    """The decision of the second region may leave out what the first one computes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.between = nn.Mish()
        self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.choose = InputChoice(n_candidates=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.choose([x, self.between(self.one(x))]))


def test_weights_of_a_region_that_is_not_reached_have_no_gradient() -> None:
    decisions = {"LayerChoice1": [0.5, 0.5], "LayerChoice2": [0.5, 0.5], "InputChoice3": [1.0, 0.0]}
    assert_same(*compared(TwoRegions, decisions))


@pytest.mark.parametrize("layer", LAYERS)
def test_batch_statistics_of_images_with_an_outlier(layer: str, instruction_set: str) -> None:
    """What a ReLU leaves of an image may be its first pixel: not what to take a variance about."""
    results = []
    images = 1e-3 * torch.rand(4, 8, 12, 11)
    images[:, :, 0, 0] = 2
    for dtype, compile_it in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        torch.manual_seed(0)
        candidates = [nn.Sequential(LAYERS[layer](), nn.BatchNorm2d(8)), nn.Identity()]
        model = nn.Sequential(LayerChoice(candidates)).to(dtype)
        Decided(model).decide({"LayerChoice1": torch.tensor([True, False])})
        compiled = nascompile.compile(model) if compile_it else model
        results.append(compiled(images.to(dtype)))
        assert not isinstance(compiled, nascompile.CompiledModel) or regions(compiled)[0].plans
    numerics.assert_closer(*results)


@pytest.mark.parametrize("ratio", [1, 10])
def test_batch_statistics_of_images_with_a_mean(ratio: int, instruction_set: str) -> None:
    """A variance is not the difference of two sums of squares in fp32."""
    results = []
    for dtype, compile_it in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        torch.manual_seed(0)
        candidates = [nn.Sequential(layer, nn.BatchNorm2d(8)) for layer in (nn.MaxPool2d(3, 1, 1), nn.ReLU())]
        model = nn.Sequential(LayerChoice(candidates)).to(dtype)
        Decided(model).decide({"LayerChoice1": torch.tensor([0.5, 0.5])})
        images = torch.randn(4, 8, 9, 7) + ratio
        results.append((nascompile.compile(model) if compile_it else model)(images.to(dtype)))
    numerics.assert_closer(*results)


class DropsTwice(nn.Module):
    """The first dropout reads what the second one's choice stands behind; only the order of the program tells
    which comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 1)
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.two = LayerChoice([nn.Dropout(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = nn.functional.dropout(x)
        return self.two(self.one(x)) + y


def test_random_numbers_are_drawn_in_the_order_of_the_program() -> None:
    assert_same(*compared(DropsTwice, {"LayerChoice1": [0.5, 0.5], "LayerChoice2": [0.5, 0.5]}))
