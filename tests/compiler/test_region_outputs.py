"""A region with several outputs of which some get no gradient: what only they reach has none, as in eager
mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import LayerChoice
from tests.comparing import Decided, assert_same
from tests.compiler.region_models import Nothing, SepConv, Unit
from tests.compiler.region_steps import detached, fp64_plans, regions

Outputs = Sequence[Tensor]


@pytest.fixture(autouse=True)
def plans_in_fp64() -> Iterator[None]:
    with fp64_plans():
        yield


class Branches(nn.Module):
    """Three outputs: of `stem`, of `one` after it, and of `two`, which reads an input of its own too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 1)
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.two = LayerChoice([Unit("cba", 8), SepConv(8, 3), nn.Identity()], reduction="mean")
        self.end = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        y = self.one(x)
        return x, y, self.end(self.two(z + x))


def _one(index: int) -> Callable[[Outputs], None]:
    return lambda outputs: outputs[index].sin().sum().backward()


def _one_after_the_other(outputs: Outputs) -> None:
    outputs[1].sin().sum().backward(retain_graph=True)
    outputs[2].cos().sum().backward()


def _all(outputs: Outputs) -> None:
    torch.stack([out.sin().sum() for out in outputs]).sum().backward()


def _twice_differentiated(outputs: Outputs) -> None:
    outputs[1].sin().sum().backward(create_graph=True)


LOSSES = {
    **{f"output {index}": _one(index) for index in range(3)},
    **{"two passes": _one_after_the_other, "all": _all, "create_graph": _twice_differentiated},
}


def trained(backward: Callable[[Outputs], None], *, compile_it: bool, soft: bool) -> list[Any]:
    """Three steps: in the first all outputs have gradients, in the others those of `backward`.

    With momentum and weight decay, which a gradient of zeros moves on and None does not.
    """
    torch.manual_seed(0)
    model = Branches().double()
    mutator = Decided(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    compiled = nascompile.compile(model) if compile_it else model
    seen: list[Any] = []
    plans: list[int] = []
    for act in (_all, backward, backward):
        rows = ([0.5, 0.25], [0.5, 0.0, 0.75]) if soft else ([True, False], [True, False, True])
        masks = {
            key: torch.tensor(row, dtype=torch.float64, requires_grad=True) if soft else torch.tensor(row)
            for key, row in zip(mutator.choices_by_key, rows, strict=True)
        }
        mutator.decide(masks)
        images = [torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        optimizer.zero_grad()
        outputs = compiled(*images)
        act(outputs)
        gradients = [leaf.grad for leaf in (*images, *model.parameters(), *masks.values())]
        optimizer.step()
        seen.append(detached([outputs, gradients, dict(model.state_dict())]))
        if isinstance(compiled, nascompile.CompiledModel):
            (region,) = regions(compiled)
            assert len(region.outputs) == 3
            plans.append(len(region.plans))
    # missing gradients are no reason for another plan
    assert not compile_it or plans[0] == plans[-1] > 0
    return seen


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("soft", [True, False])
def test_what_only_outputs_without_a_gradient_reach_has_none(loss: str, soft: bool) -> None:
    expected = trained(LOSSES[loss], compile_it=False, soft=soft)
    missing = sum(gradient is None for gradient in expected[-1][1])
    assert missing > 0 or soft
    assert_same(trained(LOSSES[loss], compile_it=True, soft=soft), expected)


class Constant(nn.Module):
    """The first output has nothing that wants a gradient, the second only where the decision says so."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.op = LayerChoice([Unit("acb", 8), Nothing()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(x)
        return x, self.op(x)


def test_outputs_that_lead_nowhere() -> None:
    model = Constant().double()
    mutator = Decided(model)
    compiled = nascompile.compile(model)
    for mask in ([True, False], [False, True]):
        mutator.decide({"LayerChoice1": torch.tensor(mask)})
        first, second = compiled(torch.randn(2, 8, 5, 4, dtype=torch.float64))
        assert [first.requires_grad, second.requires_grad] == [False, mask[0]]
        loss = (first + second).sin().sum()
        if mask[0]:
            found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            assert all(gradient.requires_grad for gradient in found)
    assert regions(compiled)[0].plans
