"""While one thread traces a model, others go on as if nothing had happened, and trace after it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler import patching
from nascompile.mutables import LayerChoice
from nascompile.random import RandomMutator
from tests.space_models import Double

# made here: a trace during which random numbers are drawn is given up
LAYERS = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def call_a_module() -> Tensor:
    return LAYERS(torch.ones(1, 2))


def set_an_attribute() -> Tensor:
    LAYERS.number = nn.Parameter(torch.ones(2))
    number = LAYERS.number
    del LAYERS.number
    assert isinstance(number, Tensor)
    return number


def run_a_function() -> Tensor:
    return Double.apply(torch.ones(2, requires_grad=True)) * torch.zeros(2)


def make_tensors() -> Tensor:
    return torch.FloatTensor(2).zero_() + torch.autograd.Variable(torch.ones(2), requires_grad=True)


def keep_hooks() -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return torch.ones(2, requires_grad=True).exp()


WORK = (call_a_module, set_an_attribute, run_a_function, make_tensors, keep_hooks)


class Net(nn.Module):
    """Has another thread do some work whenever its forward runs, and so while it is traced."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)], key="choice")
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.work).result()
        return self.choice(x)


@pytest.mark.parametrize("work", WORK)
def test_other_threads_are_let_alone(work: Callable[[], Tensor]) -> None:
    seen: list[Tensor] = []
    model = Net(lambda: seen.append(work()))
    RandomMutator(model).reset()
    compiled = nascompile.compile(model)
    x = torch.randn(1, 2, 4, 4)
    found = compiled(x)
    # an error of the other thread would have ended the trace
    assert compiled.islands == []
    assert seen
    assert all(type(value) in (Tensor, nn.Parameter) for value in seen)
    torch.testing.assert_close(found, model(x))


def test_several_threads_may_make_the_first_call() -> None:
    choices = [LayerChoice([nn.Conv2d(2, 2, k, padding=k // 2) for k in (1, 3)]) for _ in range(6)]
    model = nn.Sequential(*choices)
    RandomMutator(model).reset()
    compiled = nascompile.compile(model)
    x = torch.randn(1, 2, 4, 4)
    together = threading.Barrier(4)

    def call(_: int) -> Tensor:
        together.wait()
        return compiled(x)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(4)):
            torch.testing.assert_close(found, model(x))


def test_a_thread_that_is_waited_for_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced forward waits for a thread that wants to trace a model of its own."""
    monkeypatch.setattr(patching, "PATIENCE", 0.2)
    inner = nascompile.compile(nn.Sequential(nn.Conv2d(2, 2, 1)))
    x = torch.randn(1, 2, 4, 4)
    model = Net(lambda: inner(x))
    RandomMutator(model).reset()
    compiled = nascompile.compile(model)
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.islands == []
    (island,) = inner.islands
    assert "another thread has been tracing a model for 0.2 s" in island.reason


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)], key="choice")
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return self.last(pool.submit(self.choice, x).result())


def test_what_computes_in_threads_of_its_own_runs_as_written() -> None:
    model = Parallel()
    RandomMutator(model).reset()
    compiled = nascompile.compile(model)
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(compiled(x), model(x))
    (island,) = compiled.islands
    assert "threads of its own" in island.reason
