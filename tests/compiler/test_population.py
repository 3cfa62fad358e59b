"""A population gives what its model gives for one architecture at a time."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nascompile.compiler.errors import ArchitectureError, SpaceError
from nascompile.compiler.population import Population
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from tests import random_spaces
from tests.comparing import Decided, assert_same
from tests.compiler.populations import (
    SPACES,
    Architecture,
    Chain,
    assert_exact,
    drawn,
    one_at_a_time,
    together,
)
from tests.space_models import build, inputs
from tests.space_plans import Island, Plan, chain


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """How often the forward of each module is called, by path."""
    calls: Counter[str] = Counter()
    originals: list[tuple[Any, str, Any]] = []
    paths = {module: path for path, module in model.named_modules()}
    for kind in {type(module) for module in paths}:
        original = kind.forward

        @functools.wraps(original)
        def forward(self: nn.Module, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() and self in paths:
                calls[paths[self]] += 1
            return original(self, *args, **kwargs)

        originals.append((kind, "forward", kind.__dict__.get("forward")))
        kind.forward = forward
    try:
        yield calls
    finally:
        for kind, name, own in originals:
            if own is None:
                delattr(kind, name)
            else:
                setattr(kind, name, own)


@pytest.mark.parametrize("name", SPACES)
def test_published_spaces(name: str) -> None:
    model = SPACES[name]()
    assert_exact(model, drawn(model, 5), torch.randn(2, 3, 16, 16))


def test_a_batch_of_another_size() -> None:
    model = SPACES["nasbench201"]().eval()
    architectures = drawn(model, 3)
    population = Population(model, architectures, exact=True)
    with torch.no_grad():
        for size in (4, 1):
            x = torch.randn(size, 3, 16, 16)
            assert_same(together(population, x), one_at_a_time(model, architectures, x), exact=True)


# ----- what is computed


def test_each_candidate_runs_once_for_each_input() -> None:
    model = Chain().eval()
    architectures: list[Architecture] = [
        {"a": a, "b": b, "c": c} for a, b, c in [(0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)]
    ]
    population = assert_exact(model, architectures, torch.randn(3, 4))
    with torch.no_grad(), counted(model) as calls:
        together(population, torch.randn(3, 4))
    del calls["a"], calls["b"], calls["c"]
    # a.0 serves four; b.0 sees a.0 and a.1; c.1 sees b.0 and b.1 of a.0
    assert calls == {"a.0": 1, "a.1": 1, "b.0": 2, "b.1": 1, "c.0": 2, "c.1": 2, "head": 4}


class Edges(nn.Module):
    """Edges from one source, and a choice of two of them."""

    def __init__(self, reduction: str = "sum", n_chosen: int | None = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.edges = nn.ModuleList(
            LayerChoice([nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Identity()], key=f"e{i}")
            for i in range(3)
        )
        self.switch = InputChoice(3, n_chosen=n_chosen, reduction=reduction, key="switch")
        self.reduction = reduction

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        out = self.switch([edge(x) for edge in self.edges])
        if self.reduction == "none":
            return [2 * one for one in (out[0], out[1])]
        return x if out is None else out * 2


def edges(switch: Any, *layers: Any) -> Architecture:
    return {**{f"e{i}": layer for i, layer in enumerate(layers)}, "switch": switch}


def test_an_edge_is_shared_where_others_differ_and_runs_only_when_chosen() -> None:
    model = Edges()
    architectures = [edges([0, 1], 0, 0, 0), edges([0, 1], 0, 1, 0), edges([0, 2], 0, 0, 0)]
    population = assert_exact(model, architectures, torch.randn(1, 3, 4, 4))
    with torch.no_grad(), counted(model) as calls:
        together(population, torch.randn(1, 3, 4, 4))
    assert {p: n for p, n in calls.items() if p.count(".") == 2} == {
        "edges.0.0": 1, "edges.1.0": 1, "edges.1.1": 1, "edges.2.0": 1,
    }  # fmt: skip


@pytest.mark.parametrize("reduction", ["sum", "mean", "concat", "none"])
def test_reductions_of_inputs(reduction: str) -> None:
    architectures = [edges(s, a, b, 2) for s in ([0, 1], [1, 2]) for a in (0, 1) for b in (0, 2)]
    assert_exact(Edges(reduction), architectures, torch.randn(2, 3, 4, 4))


class TwoReductions(nn.Module):
    """The same values summed and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.total = InputChoice(2, reduction="sum", key="total")
        self.mean = InputChoice(2, reduction="mean", key="mean")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = [x + 1, x - 2]
        return self.total(both), self.mean(both)


def test_two_reductions_of_the_same_values() -> None:
    architectures: list[Architecture] = [{"total": [0, 1], "mean": [0, 1]}, {"total": 0, "mean": [0, 1]}]
    assert_exact(TwoReductions(), architectures, torch.randn(2, 4))


def test_weights_and_several_layers() -> None:
    weighed = [edges([0.5, 0.25, 0.0], [0.2, 0.0, 0.8], 1, 0), edges([0.5, 0.25, 0.0], [0.2, 0.0, 0.7], 1, 0)]
    several = [edges([0, 1], [True, True, False], [1, 2], 0), edges([0, 1], [True, True, False], [0, 2], 0)]
    assert_exact(Edges(), [*weighed, *several], torch.randn(2, 3, 4, 4))


def test_a_choice_that_selects_nothing() -> None:
    architectures = [edges(s, 0, 1, 0) for s in ([], [0], [0, 1], [])]
    assert_exact(Edges(n_chosen=None), architectures, torch.randn(2, 3, 4, 4))


class Shared(nn.Module):
    """Two choices under one key, and one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="k")
        self.second = LayerChoice([nn.Linear(4, 4), nn.Sigmoid()], key="k")
        self.again = LayerChoice([nn.Linear(4, 4), nn.Identity()], key="again", return_mask=True)

    def forward(self, x: Tensor) -> Any:
        y, _ = self.again(self.second(self.first(x)))
        z, mask = self.again(y)
        return z, mask


def test_shared_keys_and_masks() -> None:
    architectures: list[Architecture] = [{"k": k, "again": again} for k in (0, 1) for again in (0, 1)]
    assert_exact(Shared(), architectures, torch.randn(3, 4))


class Inner(nn.Module):
    """A branch on data."""

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="inner")

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        return y * 2 if y.mean() > 0 else y - 1


class WithIsland(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="before")
        self.island = Inner()
        self.after = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="after")

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.island(self.before(x)))


def test_an_island_runs_once_for_each_decision_inside() -> None:
    model = WithIsland().eval()
    architectures: list[Architecture] = [
        {"before": 0, "inner": i, "after": a} for i in (0, 1) for a in (0, 1)
    ]
    population = assert_exact(model, architectures, torch.randn(3, 4))
    with torch.no_grad(), counted(model) as calls:
        together(population, torch.randn(3, 4))
    assert calls["island"] == 2


class Nested(nn.Module):
    """A candidate with a choice of its own, after an expensive layer."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = LayerChoice([WithChoice(), nn.Tanh()], key="outer")

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


class WithChoice(MutableScope):
    def __init__(self) -> None:
        super().__init__("scope")
        self.first = nn.Linear(4, 4)
        self.inner = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="inner")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def test_candidates_with_choices_are_looked_into() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = LayerChoice([Nested(), nn.Tanh()], key="top")

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x)

    model = Model()
    architectures: list[Architecture] = [
        {"top": t, "outer": o, "inner": i} for t in (0, 1) for o in (0, 1) for i in (0, 1)
    ]
    population = assert_exact(model, architectures, torch.randn(3, 4))
    with torch.no_grad(), counted(model) as calls:
        together(population, torch.randn(3, 4))
    assert calls["outer.0.outer.0.inner.0"] == calls["outer.0.outer.0.inner.1"] == 1


def test_duplicates_are_one() -> None:
    model = Chain().eval()
    architectures: list[Architecture] = [
        {"a": 0, "b": [0], "c": "2"},
        {"c": 2, "b": 0, "a": [True, False, False]},
    ]
    population = assert_exact(model, architectures, torch.randn(3, 4))
    assert len(population.masks) == 1
    assert [positions for positions, _ in population.outputs(torch.randn(3, 4))] == [[0, 1]]


def test_no_architectures() -> None:
    assert list(Population(Chain(), []).outputs(torch.randn(3, 4))) == []


def test_all_wrong_architectures_are_named_before_anything_runs() -> None:
    model = Chain()
    right: Architecture = {"a": 0, "b": 0, "c": 0}
    with counted(model) as calls, pytest.raises(ArchitectureError) as caught:
        Population(model, [right, {**right, "a": 7}, {"a": 0, "b": 0}])
    assert "architecture 1: key 'a': index 7 is out of range" in str(caught.value)
    assert "architecture 2: Missing keys in fixed architecture: c" in str(caught.value)
    assert not calls


def test_a_failing_architecture_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([nn.Linear(4, 4), nn.Linear(3, 4)], key="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.op(x)

    population = Population(Model(), [{"op": 0}, {"op": 1}])
    with torch.no_grad(), pytest.raises(RuntimeError) as caught:
        together(population, torch.randn(2, 4))
    assert caught.value.__notes__ == ["while running architecture 1"]


def test_a_missing_candidate_is_named() -> None:
    model = Chain()
    model.a[1] = None
    with torch.no_grad(), pytest.raises(SpaceError, match="candidate '1' is None and cannot be chosen"):
        together(Population(model, [{"a": 1, "b": 0, "c": 0}]), torch.randn(2, 4))


def test_the_bound_mutator_keeps_its_decision() -> None:
    model = Chain().eval()
    mutator = Decided(model)
    mutator.decide({key: torch.tensor([True, False, False]) for key in "abc"})
    x = torch.randn(3, 4)
    with torch.no_grad():
        before = model(x)
        population = Population(model, [{"a": 1, "b": 1, "c": 2}])
        assert not torch.equal(together(population, x)[0], before)
        assert_same(model(x), before, exact=True)
    assert mutator.mutables is not None
    assert model.a.bound_mutator is mutator


# ----- any space


CHECKS: Any = list(HealthCheck)


def _is_repeatable(plan: Plan) -> bool:
    # what counts its calls or draws random numbers has no value of its own
    return not any(isinstance(b, Island) and b.how in ("counter", "draw") for b in chain(plan))


_drawn = (
    random_spaces.plans()
    .filter(_is_repeatable)
    .flatmap(
        lambda plan: st.tuples(
            st.just(plan), st.lists(random_spaces.architectures(plan), min_size=2, max_size=4)
        )
    )
)


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate), suppress_health_check=CHECKS)
@given(_drawn, st.sampled_from([2**30, 0]), st.booleans())
def test_every_space(case: tuple[Plan, list[Architecture]], memory: int, exact: bool) -> None:
    plan, architectures = case
    model = build(plan).eval()
    population = Population(model, architectures, memory=memory, exact=exact)
    with torch.no_grad():
        for batch in (2, 3):
            args, kwargs = inputs(plan, batch=batch)
            expected = one_at_a_time(model, architectures, *args, **kwargs)
            assert_same(together(population, *args, **kwargs), expected, exact=exact or not memory)


def test_the_forced_decision_ends_with_the_call() -> None:
    model = Chain().eval()
    with torch.no_grad():
        together(Population(model, drawn(model, 2)), torch.randn(2, 4))
        with pytest.raises(ValueError, match="Mutator not set"):
            model(torch.randn(2, 4))
