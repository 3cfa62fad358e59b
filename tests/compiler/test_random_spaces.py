"""What holds for every search space: compiled equals eager, pruned equals the supernet under the decision."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from torch import Tensor, nn

import nascompile
from nascompile.compiler.mutables import Mutable
from nascompile.compiler.prune import load_supernet
from nascompile.compiler.region import region
from nascompile.compiler.region.executors import NATIVE, REFERENCE
from nascompile.compiler.trace import ModelTracer
from nascompile.fixed import FixedArchitecture
from tests import random_spaces as spaces
from tests import space_models
from tests.comparing import Decided, assert_close, assert_same, decision, replaced, step, tensors
from tests.space_by_hand import handwritten
from tests.space_models import build, inputs
from tests.space_plans import Island, Plan, chain, resolved

# shrinking takes minutes; the first example found is small enough to read
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
CHECKS: Any = list(HealthCheck)
EXAMPLES = settings(max_examples=60, phases=PHASES, suppress_health_check=CHECKS)
FEWER = settings(max_examples=30, phases=PHASES, suppress_health_check=CHECKS)


@pytest.fixture(scope="module", autouse=True)
def plans_in_fp64() -> Iterator[None]:
    """Regions run their plans here too: by the reference, for these models are in fp64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region, "EXECUTORS", (NATIVE, REFERENCE))
        yield


def run(model: nn.Module, plan: Plan, masks: dict[str, Tensor], *, seed: int = 0, batch: int = 2) -> Any:
    """One training step."""
    return step(model, masks, *inputs(plan, seed=seed, batch=batch), seed=seed)


def attempt(model: nn.Module, plan: Plan, masks: dict[str, Tensor], **options: Any) -> dict[str, Any] | None:
    """`run`, or None where eager autograd refuses an in-place operation of the user's."""
    try:
        return run(model, plan, masks, **options)
    except RuntimeError as error:
        if not re.search("modified by an inplace operation|is being modified inplace", str(error)):
            raise
        event("eager autograd refuses an in-place operation")
        return None


plans_and_architectures = spaces.plans().flatmap(
    lambda plan: st.tuples(st.just(plan), st.lists(spaces.architectures(plan), min_size=1, max_size=3))
)


def both(plan: Plan, *, example: bool) -> tuple[nn.Module, Decided, nascompile.CompiledModel, Decided]:
    eager, model = build(plan), build(plan)
    args, kwargs = inputs(plan)
    compiled = nascompile.compile(model, args if example and not kwargs else None)
    return eager, Decided(eager), compiled, Decided(model)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    # some spaces have no weights at all
    parameters = [*model.parameters(), nn.Parameter(torch.zeros(()))]
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.01)


def island_paths(plan: Plan) -> set[str]:
    """The modules that must stay islands, and no others."""
    if plan.root == "choice":
        return set()
    if plan.root == "sequential":
        return {str(index) for index, block in enumerate(chain(plan)) if isinstance(block, Island)}
    return {
        f"blocks.{index}"
        for index, (first, block) in enumerate(resolved(plan))
        if index == first and isinstance(block, Island)
    }


@EXAMPLES
@given(plans_and_architectures, st.booleans())
def test_compiled_equals_eager(drawn: tuple[Plan, list[dict[str, Any]]], example: bool) -> None:
    plan, architectures = drawn
    eager, oracle, compiled, mutator = both(plan, example=example)
    optimizers = [sgd(model) for model in (eager, compiled)]
    for number, architecture in enumerate([*architectures, *architectures]):
        for mode in (True, False):
            eager.train(mode)
            compiled.train(mode)
            theirs, ours = decision(architecture), decision(architecture)
            oracle.decide(theirs)
            mutator.decide(ours)
            expected = attempt(eager, plan, theirs, seed=number, batch=2 + number % 2)
            if expected is None:
                return
            assert_same(run(compiled, plan, ours, seed=number, batch=2 + number % 2), expected)
            if mode:
                for optimizer in optimizers:
                    optimizer.step()
    assert {island.path for island in compiled.islands} == island_paths(plan)
    assert all(island.file == space_models.__file__ and island.line for island in compiled.islands)


@FEWER
@given(plans_and_architectures)
def test_decisions_are_data(drawn: tuple[Plan, list[dict[str, Any]]]) -> None:
    plan, architectures = drawn
    model = build(plan)
    compiled = nascompile.compile(model)
    mutator = Decided(model)
    with pytest.MonkeyPatch.context() as patch:
        made: list[ModelTracer] = []
        original = ModelTracer.__init__

        def counted(self: ModelTracer, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            original(self, *args, **kwargs)

        patch.setattr(ModelTracer, "__init__", counted)
        counts = []
        for round_, architecture in enumerate([*architectures * 2]):
            mutator.decide(decision(architecture))
            if attempt(compiled, plan, mutator.decision, seed=round_) is None:
                return
            counts.append(len(made))
        assert plan.root == "choice" or made
    # islands are looked into when a decision first leads there; the model itself is traced once
    assert counts[-1] == counts[len(architectures) - 1]
    # a decision for nothing runs the model's own code, and the traces of its parts
    something = all(any(mask) for architecture in architectures for mask in architecture.values())
    if something and not island_paths(plan) and not nested(plan):
        assert len(set(counts)) == 1


def draws(plan: Plan) -> bool:
    return any(word in repr(plan) for word in ("dropout", "drop_path", "draw"))


def nested(plan: Plan) -> bool:
    return "Nested" in repr(plan)


plans_and_one = spaces.plans().flatmap(lambda plan: st.tuples(st.just(plan), spaces.architectures(plan)))


def example(plan: Plan) -> tuple[Any, ...] | None:
    """Example inputs by position; None where the model wants keywords, and defaults have to be guessed."""
    args, kwargs = inputs(plan)
    return None if kwargs else args


def infer(model: nn.Module, plan: Plan, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The outputs for one batch, without gradients."""
    torch.manual_seed(seed)
    random.seed(seed)
    args, kwargs = inputs(plan, seed=seed)
    args, kwargs = replaced((args, kwargs), [leaf.detach().to(dtype) for leaf in tensors((args, kwargs))])
    with torch.no_grad():
        return model(*args, **kwargs)


def state(model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]


@EXAMPLES
@given(plans_and_one)
def test_pruned_equals_the_supernet(drawn: tuple[Plan, dict[str, Any]]) -> None:
    plan, architecture = drawn
    supernet = build(plan)
    # statistics that differ from their initial values
    for name, buffer in supernet.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    before = state(supernet)
    lean = nascompile.prune(supernet, architecture, example(plan))
    assert_same(state(supernet), before, exact=True)
    assert not [m for m in lean.modules() if isinstance(m, Mutable)]
    assert lean.training == supernet.training
    FixedArchitecture(supernet, architecture).reset()
    # in training, what the lean network leaves out no longer draws random numbers
    for mode in (False,) if draws(plan) else (False, True):
        assert_same(infer(lean.train(mode), plan), infer(supernet.train(mode), plan), exact=not mode)
    by_hand = handwritten(plan, architecture)
    assert sum(p.numel() for p in lean.parameters()) == sum(p.numel() for p in by_hand.parameters())
    assert set(lean.meta["nascompile"]["islands"]) == island_paths(plan)


@FEWER
@given(plans_and_one)
def test_compiled_models_travel(drawn: tuple[Plan, dict[str, Any]]) -> None:
    """Checkpoints in both directions, deepcopy and pickle, of a model that has been called."""
    plan, architecture = drawn
    eager, oracle, compiled, mutator = both(plan, example=False)
    other = nascompile.compile(build(plan, seed=1))
    other.load_state_dict(eager.state_dict())
    assert_same(dict(other.state_dict()), dict(eager.state_dict()), exact=True)
    oracle.decide(decision(architecture))
    mutator.decide(decision(architecture))
    expected = attempt(eager, plan, oracle.decision)
    if expected is None:
        return
    assert_same(run(compiled, plan, mutator.decision), expected)
    eager.load_state_dict(compiled.state_dict())
    twins = [copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))]
    expected = infer(eager, plan)
    for model in (compiled, *twins):
        assert isinstance(model, nascompile.CompiledModel)
        assert_same(infer(model, plan), expected)
        assert_same(dict(model.state_dict()), dict(eager.state_dict()))
    mine = {id(tensor) for tensor in (*compiled.parameters(), *compiled.buffers())}
    assert not any(id(tensor) in mine for twin in twins for tensor in (*twin.parameters(), *twin.buffers()))


@FEWER
@given(plans_and_one)
def test_other_types(drawn: tuple[Plan, dict[str, Any]]) -> None:
    """Autocast to bf16, and a model moved to fp32 after it was compiled."""
    plan, architecture = drawn
    eager, oracle, compiled, mutator = both(plan, example=True)
    oracle.decide(decision(architecture))
    mutator.decide(decision(architecture))
    eager.float()
    compiled.float()
    eager.eval()
    compiled.eval()
    single = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(
        infer(compiled, plan, dtype=torch.float32), infer(eager, plan, dtype=torch.float32), **single
    )
    with torch.autocast("cpu", torch.bfloat16):
        expected = infer(eager, plan, dtype=torch.float32)
        actual = infer(compiled, plan, dtype=torch.float32)
    if "draw" not in repr(plan) and "branch" not in repr(plan) and "while" not in repr(plan):
        assert_close(actual, expected, rtol=0.05, atol=0.05)
    assert [t.dtype for t in tensors(actual)] == [t.dtype for t in tensors(expected)]


plans_and_several = spaces.plans(islands=False).flatmap(
    lambda plan: st.tuples(st.just(plan), st.lists(spaces.architectures(plan), min_size=2, max_size=3))
)


@FEWER
@given(plans_and_several)
def test_lean_networks_side_by_side(drawn: tuple[Plan, list[dict[str, Any]]]) -> None:
    """Several architectures of one supernet share nothing and use every parameter; weights kept or fresh."""
    plan, architectures = drawn
    supernet = build(plan)
    leans = [nascompile.prune(supernet, architecture, example(plan)) for architecture in architectures]
    owners = [supernet, *leans]
    ids = [{id(tensor) for tensor in (*model.parameters(), *model.buffers())} for model in owners]
    assert sum(map(len, ids)) == len(set().union(*ids))
    for lean, architecture in zip(leans, architectures, strict=True):
        fresh = nascompile.prune(supernet, architecture, example(plan), weights="fresh")
        assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in lean.named_parameters()]
        load_supernet(fresh, supernet)
        assert_same(dict(fresh.state_dict()), dict(lean.state_dict()), exact=True)
        assert_same(infer(fresh.eval(), plan), infer(lean.eval(), plan), exact=True)
        if attempt(lean.train(), plan, {}) is not None:
            assert [name for name, parameter in lean.named_parameters() if parameter.grad is None] == []
