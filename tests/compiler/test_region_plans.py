"""Plans under everything that autograd, users and threads do to them; see test_regions.py for the numbers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nascompile.compiler.region import execution, region
from tests.comparing import EXACT, assert_close, assert_same, step
from tests.compiler import region_layouts, region_patterns
from tests.compiler.region_models import CASES, Case
from tests.compiler.region_pairs import NET, Pair
from tests.compiler.region_simulation import overlaps, simulated
from tests.compiler.region_steps import (
    Rounds,
    compiled_of,
    decide,
    eagerly,
    fp64_plans,
    images,
    regions,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
MORE = [*region_layouts.CASES, *region_patterns.CASES]
PLANNED = [case for case in (*CASES, *MORE) if case.regions == 1 and not (case.op_by_op or case.in_parts)]
SEVERAL = [
    case
    for case in PLANNED
    if case.name
    in ("orders", "stride 2, odd sizes", "darts", "kernels of 5 channels", "inputs", "concatenated")
]
SEVERAL += [case for case in PLANNED if case.name in ("several inputs and outputs", "mobile", "shared keys")]
SEVERAL += [case for case in MORE if case in PLANNED]


@pytest.fixture(autouse=True)
def plans_in_fp64() -> Iterator[None]:
    with fp64_plans():
        yield


# ----- decisions


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that are made."""
    made: list[Any] = []
    original = region.build

    def counted(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(region, "build", counted)
    return made


def test_nothing_is_planned_for_a_decision(built: list[Any]) -> None:
    pair = Pair(dtype=torch.float32)
    (x,) = images(NET, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for first in (torch.ones(3), torch.tensor([True, False, False])):
        pair.mutators[1].decide({"LayerChoice1": first})
        pair.compiled(x)
    count, entries = len(built), len(pair.compiled.entries)
    for number in range(50):
        chosen = torch.randint(3, (), generator=generator)
        mask: Tensor = torch.arange(3) == chosen
        if number % 3 == 1:
            mask = torch.rand(3, generator=generator) * mask.logical_not()
        elif number % 3 == 2:
            mask = mask.logical_not()
        pair.mutators[1].decide({"LayerChoice1": mask})
        pair.compiled(x).sum().backward()
    assert (len(built), len(pair.compiled.entries)) == (count, entries)


@pytest.mark.parametrize("mask", [[0.3, 0.0, 0.7], [True, False, True], [0.0, 0.0, 1.0]])
def test_what_is_left_out_does_not_move(mask: list[Any]) -> None:
    pair = Pair()
    for model, mutator in zip((pair.eager, pair.compiled), pair.mutators, strict=True):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        mutator.decide({"LayerChoice1": torch.tensor(mask)})
        model(*images(NET, torch.float64)).sum().backward()
        out = [f"op.{index}." for index, weight in enumerate(mask) if not weight]
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == name.startswith(tuple(out)), name
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]) == name.startswith(tuple(out)), name
    assert pair.plans


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.name)
def test_fresh_memory_may_hold_anything(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Rounds] = []
    original = execution.new_memory
    for fill in (0.0, torch.nan):
        monkeypatch.setattr(execution, "new_memory", lambda *args, f=fill: original(*args).fill_(f))
        compiled, mutator = compiled_of(case, torch.float32)
        results.append(train(compiled, mutator, case, torch.float32))
        assert regions(compiled)[0].plans
    assert_close(results[1], results[0], **EXACT)


# ----- the plan itself


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.name)
def test_phases_and_liveness(case: Case) -> None:
    """Image by image in any order, with nan wherever the plan says that nothing lives; see the simulation."""
    with simulated() as made:
        compiled, mutator = compiled_of(case, torch.float64)
        actual = train(compiled, mutator, case, torch.float64)
    assert_close(actual, eagerly(case, torch.float64), rtol=1e-9, atol=1e-10)
    assert len(made) >= 3
    assert not compiled.islands
    assert [overlaps(one) for one in made] == [[]] * len(made)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_are_the_same_bit_for_bit(threads: int) -> None:
    torch.set_num_threads(threads)
    results = []
    for _ in range(2):
        compiled, mutator = compiled_of(PLANNED[0], torch.float32)
        results.append(train(compiled, mutator, PLANNED[0], torch.float32))
        assert {plan.settings.chunks for plan in regions(compiled)[0].plans} == {threads}
    assert_close(results[1], results[0], **EXACT)


# ----- autograd


def test_backward_twice() -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> list[Any]:
        (x,) = images(NET, torch.float64)
        y = model(x)
        y.square().sum().backward(retain_graph=True)
        y.sin().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters()), *(m.grad for m in masks.values()),
                *model.buffers()]  # fmt: skip

    pair = Pair()
    assert_same(*reversed(pair.each(act)))
    assert pair.plans


@pytest.mark.parametrize("kind", ["soft", "some", "one"])
@pytest.mark.parametrize(
    "training",
    [
        True,
        False,
    ],
)
def test_gradients_of_gradients(kind: str, training: bool) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> list[Any]:
        (x,) = images(NET, torch.float64)
        y = model(x)
        leaves = [x, *model.parameters(), *(m for m in masks.values() if m.requires_grad)]
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True, allow_unused=True)
        torch.stack([g.square().sum() for g in first if g is not None]).sum().backward()
        return [first, [leaf.grad for leaf in leaves], list(model.buffers())]

    pair = Pair(lambda model: model.train(training))
    expected, actual = pair.each(act, kind)
    assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    assert pair.plans


def test_two_forwards_before_a_backward() -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> list[Any]:
        outs = [model(*images(NET, torch.float64, seed=seed)) for seed in range(2)]
        (outs[0].sin().sum() + outs[1].square().sum()).backward()
        return [*outs, *(p.grad for p in model.parameters()), *(m.grad for m in masks.values())]

    pair = Pair()
    assert_same(*reversed(pair.each(act)))


def test_memory_comes_back_without_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, taken = Pair(), []
    original = execution.new_memory
    monkeypatch.setattr(execution, "new_memory", lambda *args: taken.append(args) or original(*args))
    decide(pair.mutators[1], "soft", torch.float64)
    for number in range(4):
        if number == 1:
            taken.clear()
        kept = pair.compiled(*images(NET, torch.float64))
        del kept
        gc.collect()
    assert taken == []
    kept = [pair.compiled(*images(NET, torch.float64)) for _ in range(2)]
    assert taken
    taken.clear()
    for out in kept:
        out.sum().backward()
    kept = [pair.compiled(*images(NET, torch.float64)) for _ in range(2)]
    assert taken == []


@pytest.mark.parametrize("name", ["end.1.weight", "op.0.conv.weight", "stem.1.weight"])
def test_a_weight_changed_before_backward_is_an_error(name: str) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> None:
        out = model(*images(NET, torch.float64))
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    pair = Pair()
    pair.each(act)
    assert pair.plans


def _freeze(model: Any) -> None:
    model.op[0].requires_grad_(False)
    model.stem[0].weight.requires_grad_(False)


def _freeze_all(model: Any) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize("freeze", [_freeze, _freeze_all])
@pytest.mark.parametrize("early", [True, False])
def test_frozen_weights(freeze: Callable[[Any], None], early: bool) -> None:
    pair = Pair(freeze if early else None)
    pair.assert_same_steps()
    if not early:
        pair.change(freeze)
        pair.assert_same_steps()
        pair.change(lambda model: model.requires_grad_(True))
        pair.assert_same_steps()
    assert pair.plans


def test_inputs_without_gradient_and_other_batches() -> None:
    pair = Pair()
    for batch, wants in ((3, False), (3, True), (2, False), (1, True), (3, False)):
        inputs = tuple(x.detach().requires_grad_(wants) for x in images(NET, torch.float64, batch=batch))
        expected, actual = pair.each(lambda model, masks, i=inputs: step(model, masks, i, {}))
        assert_same(actual, expected)
    assert pair.plans >= 3


def test_without_gradients_and_with() -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> Any:
        with torch.no_grad():
            first = model(*images(NET, torch.float64))
        with torch.inference_mode():
            second = model(*images(NET, torch.float64)).clone()
        return [first, second, step(model, masks, images(NET, torch.float64), {})]

    pair = Pair()
    expected, actual = pair.each(act)
    assert_same(actual, expected)


def test_training_needs_more_than_one_value() -> None:
    pair = Pair()
    decide(pair.mutators[1], "soft", torch.float64)
    pair.compiled(torch.randn(3, 8, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        pair.compiled(torch.randn(1, 8, 1, 1, dtype=torch.float64))
