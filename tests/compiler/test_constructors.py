"""Tensors that programs make as old torch did, above all to drop paths: recorded, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import FloatTensor, Tensor, nn
from torch.autograd import Variable

import nascompile
from nascompile.compiler.constructors import KINDS
from nascompile.compiler.trace import ModelTracer
from nascompile.mutables import LayerChoice
from tests.comparing import Decided, assert_same, step
from tests.compiler.region_models import SepConv, Unit
from tests.compiler.region_steps import fp64_plans

Drop = Callable[[Tensor, float], Tensor]


def _darts(x: Tensor, prob: float) -> Tensor:
    if prob > 0.0:
        keep = 1.0 - prob
        mask = torch.FloatTensor(x.size(0), 1, 1, 1).bernoulli_(keep)
        x.div_(keep)
        x.mul_(mask)
    return x


def _darts_of_2018(x: Tensor, prob: float) -> Tensor:
    if prob > 0.0:
        keep = 1.0 - prob
        mask = Variable(torch.FloatTensor(x.size(0), 1, 1, 1).bernoulli_(keep))
        x.div_(keep)
        x.mul_(mask)
    return x


def _sizes_as_one(x: Tensor, prob: float) -> Tensor:
    return x * torch.FloatTensor(x.size()).bernoulli_(1 - prob) + torch.FloatTensor([0.5, 2.0]).sum()


def _timm(x: Tensor, prob: float) -> Tensor:
    keep = 1 - prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    mask = x.new_empty(shape).bernoulli_(keep)
    if keep > 0.0:
        mask.div_(keep)
    return x * mask


def _typed(x: Tensor, prob: float) -> Tensor:
    numbers = torch.LongTensor(3).fill_(2)
    return x if isinstance(prob, torch.FloatTensor) else x.type(torch.DoubleTensor.dtype) * numbers.sum()


WAYS: dict[str, Drop] = {
    "darts": _darts,
    "darts of 2018": _darts_of_2018,
    "sizes as one": _sizes_as_one,
    "timm": _timm,
    "typed": _typed,
}


class Cell(nn.Module):
    """Two edges of DARTS whose paths are dropped."""

    def __init__(self, drop: Drop) -> None:
        super().__init__()
        self.drop, self.drop_path_prob = drop, 0.4
        self.one, self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)]), LayerChoice([Unit("acb", 8)])
        self.last = LayerChoice([SepConv(8, 3), Unit("acb", 8)])

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.one(x), self.two(x)
        if self.training and self.drop_path_prob > 0.0:
            y, z = self.drop(y, self.drop_path_prob), self.drop(z, self.drop_path_prob)
        return self.last(y + z)


def _rounds(drop: Drop, compile_it: bool) -> tuple[Any, list[dict[str, Any]]]:
    torch.manual_seed(0)
    model: Any = Cell(drop).double()
    mutator = Decided(model)
    model = nascompile.compile(model) if compile_it else model
    x = torch.randn(6, 8, 5, 4, dtype=torch.float64).requires_grad_()
    found = []
    for mode in (True, False):
        model.train(mode)
        choices = mutator.choices_by_key.items()
        masks = {key: torch.full((len(c),), 0.5, dtype=x.dtype, requires_grad=True) for key, c in choices}
        mutator.decide(masks)
        found.append(step(model, masks, (x,), {}, seed=3))
    return model, found


@pytest.mark.parametrize("way", WAYS)
def test_paths_are_dropped_as_in_the_program(way: str) -> None:
    _, expected = _rounds(WAYS[way], compile_it=False)
    with fp64_plans():
        compiled, actual = _rounds(WAYS[way], compile_it=True)
    assert compiled.islands == []
    assert_same(actual, expected)
    # what is dropped: the same mask, drawn anew in every call
    compiled.train()
    outputs = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        outputs.append(compiled(torch.ones(6, 8, 5, 4, dtype=torch.float64)))
    assert torch.equal(*outputs) == (way == "typed")


def test_nothing_is_left_patched() -> None:
    before = [getattr(home, name) for home, name in KINDS]
    assert torch.FloatTensor in before
    assert ModelTracer(Cell(_darts_of_2018)).trace_guessed("")
    assert [getattr(home, name) for home, name in KINDS] == before
    assert type(Variable(torch.ones(2))) is Tensor


def test_a_type_of_cuda_makes_its_tensor_there() -> None:
    cuda: Any = torch.cuda

    def drop(x: Tensor, prob: float) -> Tensor:
        return x * Variable(cuda.FloatTensor(x.size(0), 1, 1, 1).bernoulli_(1.0 - prob))

    tracer = ModelTracer(Cell(drop))
    assert tracer.trace_guessed(""), tracer.islands
    made = next(node for node in tracer.graph.nodes if node.target is torch.empty)
    assert made.kwargs == {"dtype": torch.float32, "device": "cuda"}


@pytest.mark.parametrize("make", [torch.Tensor, FloatTensor])
def test_what_cannot_be_recorded_is_said_in_words(make: Any) -> None:
    def drop(x: Tensor, prob: float) -> Tensor:
        return x * make(x.size(0), 1, 1, 1).bernoulli_(1.0 - prob)

    model = Cell(drop)
    mutator = Decided(model)
    mutator.decide({key: torch.ones(len(c)) > 0 for key, c in mutator.choices_by_key.items()})
    (island,) = nascompile.compile(model, torch.randn(6, 8, 5, 4)).islands
    assert island.reason.startswith("makes a tensor by its type, of a size that is known only when it runs")
    assert "torch.empty" in island.reason
    assert island.line == drop.__code__.co_firstlineno + 1


def test_a_variable_that_wants_a_gradient_is_refused() -> None:
    def drop(x: Tensor, prob: float) -> Tensor:
        return Variable(x, requires_grad=True)

    tracer = ModelTracer(Cell(drop))
    assert not tracer.trace_guessed("")
    assert tracer.islands[""].reason == "makes a Variable that wants a gradient"
