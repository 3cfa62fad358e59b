"""What is changed in place is seen by all who share the memory, also where a choice handed it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nascompile
from nascompile.compiler.aliases import Aliases
from nascompile.compiler.region import region
from nascompile.compiler.region.executors import NATIVE, REFERENCE
from nascompile.mutables import InputChoice, LayerChoice
from tests.comparing import Decided, assert_same, decision, step
from tests.compiler.graphs import traced
from tests.compiler.region_steps import regions
from tests.compiler.test_passes import lowered


@pytest.fixture(autouse=True)
def plans_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "EXECUTORS", (NATIVE, REFERENCE))


def conv() -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = LayerChoice([conv(), nn.Identity()], key="c")
        self.d = LayerChoice([conv(), nn.Sequential(nn.Dropout(0.0))], key="d")
        self.fresh = LayerChoice([conv(), nn.AvgPool2d(3, 1, 1)], key="fresh")
        self.i = InputChoice(n_candidates=2, n_chosen=1, key="i")
        self.relu = nn.ReLU(inplace=True)


Program = Callable[[Any, Tensor], Any]


def of(program: Program) -> nn.Module:
    torch.manual_seed(0)
    return type(program.__name__, (Base,), {"forward": program})().double()


def added(s: Any, x: Tensor) -> Any:
    x = x * 1
    y = s.c(x)
    y += 1
    return y + x


def method(s: Any, x: Tensor) -> Any:
    x = x * 1
    y = s.c(x).relu_()
    z = s.d(y)
    z *= 2
    return z + y + x


def module(s: Any, x: Tensor) -> Any:
    x = x * 1
    return s.relu(s.c(x)) + x


def function(s: Any, x: Tensor) -> Any:
    x = x * 1
    y = F.relu(s.c(x)[:, :2], inplace=True)
    return y + x[:, :2]


def one_of_two(s: Any, x: Tensor) -> Any:
    x, y = x * 1, x * 2
    z = s.i([x, y]).add_(1)
    return s.fresh(z + x) + y


def of_the_caller(s: Any, x: Tensor) -> Any:
    return s.c(x).mul_(2)


def read_again(s: Any, x: Tensor) -> Any:
    x = s.fresh(x)
    y = s.c(x)
    y += 1
    return s.fresh(s.d(x) + y)


def shared_steps(s: Any, x: Tensor) -> Any:
    x = x * 1
    z = s.d(x) * 1
    y = s.c(x)
    y.add_(1)
    return s.d(x) + y + z


def siblings(s: Any, x: Tensor) -> Any:
    x = x * 1
    y, z = s.c(x), s.d(x)
    z.sub_(1)
    return y * 2


SEEN = [added, method, module, function, one_of_two, of_the_caller, read_again, shared_steps, siblings]
HARD = [
    {"c": [c, not c], "d": [d, not d], "fresh": [True, False], "i": [c, not c]}
    for c in (True, False)
    for d in (True, False)
]
SOFT = {"c": [0.3, 0.7], "d": [0.4, 0.6], "fresh": [0.5, 0.5], "i": [0.2, 0.8]}


@pytest.mark.parametrize("program", SEEN)
def test_a_change_of_what_a_choice_handed_on_is_seen(program: Program) -> None:
    model, x = of(program), torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    mutator, compiled = Decided(model), nascompile.compile(model)
    for values in (*HARD, SOFT):
        results = []
        for called in (model, compiled):
            masks = decision({key: values[key] for key in mutator.choices_by_key})
            mutator.decide(masks)
            try:
                results.append(step(called, masks, (x,), {}))
            except RuntimeError as error:
                # autograd refuses some of the programs for some of the decisions
                results.append({"refused": "modified by an inplace operation" in str(error)})
            with torch.no_grad():
                given = x.detach().clone()
                results.append({"outputs": called(given), "changed input": given})
        assert_same(results[2:], results[:2])
    assert not compiled.islands


def why(program: Program) -> dict[str, str]:
    gm = traced(of(program))
    lowered(gm)
    return {node.name.split("_")[-1]: reason for node, reason in Aliases(gm).seen.items()}


def test_the_choice_says_why_it_is_in_no_region() -> None:
    model, x = of(added), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    Decided(model).decide(decision(HARD[3]))
    compiled = nascompile.compile(model, x)
    assert not regions(compiled)
    (entry,) = compiled.entries
    assert entry.graph_module is not None
    reason = "it may hand on its input, and iadd changes that in place"
    assert entry.graph_module.meta["outside"]["c"] == reason
    row = next(row for row in nascompile.explain(model, x).rows if row.path == "c")
    assert f"in no region: {reason}" in row.compiled


def not_used_again(s: Any, x: Tensor) -> Any:
    x = s.fresh(x)
    y = s.relu(s.c(x))
    y += 1
    return y.view(x.shape)


def of_its_own(s: Any, x: Tensor) -> Any:
    x = x * 1
    y = s.relu(s.fresh(x))
    y += 1
    return y + x


@pytest.mark.parametrize("program", [not_used_again, of_its_own])
def test_what_nobody_could_tell_stays_in_regions(program: Program) -> None:
    assert not why(program)
    model, x = of(program), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    Decided(model).decide(decision(HARD[3]))
    compiled = nascompile.compile(model, x)
    assert_same(compiled(x), model(x))
    assert len(regions(compiled)) == 1


def test_a_candidate_that_comes_to_hand_on_its_input_counts() -> None:
    model, x = of(of_its_own), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    Decided(model).decide(decision({**HARD[0], "fresh": [False, True]}))
    compiled = nascompile.compile(model, x)
    model.get_submodule("fresh")[1] = nn.Identity()  # type: ignore[operator]
    assert_same(compiled(x), model(x))
