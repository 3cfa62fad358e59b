"""The tracer itself: what stays a node, what is refused or taken for granted; nothing is left behind."""

from __future__ import annotations

import builtins
import random
from collections import deque
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler.fingerprint import fingerprint
from nascompile.compiler.guards import Guards, NotTraceable
from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.signature import call_shape, guessed_shape, inputs_like
from nascompile.compiler.snapshot import is_changeable, is_unchanged, put_back, snapshot, state
from nascompile.compiler.trace import ModelTracer
from nascompile.compiler.verify import EverythingChosen
from nascompile.mutables import LayerChoice
from tests.compiler import programs
from tests.compiler.graphs import targets, traced
from tests.compiler.programs import conv


def of(forward: Any, **parts: Any) -> nn.Module:
    model = type(forward.__name__, (programs.Program,), {"forward": forward})()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def plain(self: Any, x: Tensor) -> Tensor:
    return self.op(x) + 1


def test_choices_stay_single_nodes() -> None:
    assert targets(traced(of(plain))) == ["op", "add"]


def test_choices_leave_no_trace_when_they_are_inlined() -> None:
    model = of(plain)
    tracer = ModelTracer(model, inline_choices=True)
    with forced_mutator(EverythingChosen(weighted=False)):
        assert tracer.trace_guessed("")
    assert [node.target for node in tracer.graph.nodes if node.op == "call_module"] == ["op.0"]


class Patched(Exception):
    pass


def fails(self: Any, x: Tensor) -> Tensor:
    self.op(x)
    raise Patched("on purpose")


@pytest.mark.parametrize("forward", [plain, fails])
def test_nothing_is_left_patched(forward: Any) -> None:
    things = [
        *((nn.Module, f"__{name}__") for name in ("call", "getattr", "setattr", "delattr")),
        (torch.autograd.Function, "apply"),
        (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
        *((torch, name) for name in ("rand", "zeros", "is_tensor")),
        *((builtins, name) for name in ("isinstance", "hasattr")),
    ]
    before = [owner.__dict__.get(name) for owner, name in things]
    assert "__getattribute__" not in nn.Module.__dict__
    ModelTracer(of(forward)).trace_guessed("")
    assert [owner.__dict__.get(name) for owner, name in things] == before
    assert "__getattribute__" not in nn.Module.__dict__


def test_an_exception_in_the_users_code_is_an_island_in_words() -> None:
    tracer = ModelTracer(of(fails))
    assert not tracer.trace_guessed("")
    assert tracer.islands[""].reason == "Patched while tracing: on purpose"
    assert tracer.islands[""].line == fails.__code__.co_firstlineno + 2


def draws(self: Any, x: Tensor) -> Tensor:
    return self.op(x) * random.random() * float(numpy.random.rand()) * float(torch.rand(()).item())


def test_tracing_draws_no_random_numbers() -> None:
    tracer = ModelTracer(of(draws))
    states = (torch.get_rng_state(), numpy.random.get_state(legacy=False)["state"]["pos"], random.getstate())
    tracer.trace_guessed("")
    after = (torch.get_rng_state(), numpy.random.get_state(legacy=False)["state"]["pos"], random.getstate())
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([conv(1), conv(3)])
        self.log: list[Any] = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        self.count += 1
        return self.op(x)


def around(self: Any, x: Tensor) -> Tensor:
    return self.inner(self.op(x)) + x


def test_an_island_leaves_the_rest_traced() -> None:
    model: Any = of(around, inner=Inner())
    gm = traced(model)
    assert targets(gm) == ["op", "inner", "add"]
    assert list(gm.meta["tracer"].islands) == ["inner"]
    assert model.inner.log == []
    assert model.inner.count == 0
    # what the island read may change: the trace does not depend on it
    model.inner.count = 7
    model.inner.log.append(1)
    assert gm.meta["guards"].hold()


def asks_about_its_type(self: Any, x: Tensor) -> Tensor:
    return self.op(x) if isinstance(x, Tensor) and not isinstance(x, list | nn.Parameter) else x


def asks_about_its_attributes(self: Any, x: Tensor) -> Tensor:
    return self.op(x) if hasattr(x, "shape") and not hasattr(x, "tensors") else x


@pytest.mark.parametrize("asks", [asks_about_its_type, asks_about_its_attributes])
def test_questions_about_inputs_get_their_answer(asks: Any) -> None:
    model = of(asks)
    tracer = ModelTracer(model)
    forward, args = asks.__get__(model), (torch.ones(1),)
    assert tracer.trace_module("", lambda t: inputs_like(t, forward, args, {}))
    assert "op" in [node.target for node in tracer.graph.nodes]


def asks_about_a_choice(self: Any, x: Tensor) -> Tensor:
    y = self.op(x)
    return y[0] if isinstance(y, tuple) else y


def asks_about_a_sum(self: Any, x: Tensor) -> Tensor:
    y = self.stem(x) + 1
    return self.op(y) if torch.is_tensor(y) else y


def test_questions_about_other_values() -> None:
    tracer = ModelTracer(of(asks_about_a_choice))
    assert not tracer.trace_guessed("")
    assert "asks for the type of a value (isinstance)" in tracer.islands[""].reason
    assert targets(traced(of(asks_about_a_sum, stem=conv(1)))) == ["stem", "add", "op"]


# ----- guards


class Config:
    def __init__(self) -> None:
        self.width = 1
        self.inner = {"depth": [1]}


def test_guards_hold_until_something_read_changes() -> None:
    model: Any = of(plain)
    guards = Guards()
    config = Config()
    for name, value in (("number", 1), ("items", [1, 2]), ("config", config)):
        setattr(model, name, value)
        guards.saw(model, name, value)
    guards.traced(model.op[0])
    guards.complete(model)
    assert guards.hold()
    changes: list[tuple[Any, Any]] = [
        (lambda: setattr(model, "number", 2), lambda: setattr(model, "number", 1)),
        (lambda: setattr(model, "number", True), lambda: setattr(model, "number", 1)),
        (lambda: model.items.append(3), lambda: model.items.pop()),
        (lambda: setattr(config, "width", 2), lambda: setattr(config, "width", 1)),
        (lambda: config.inner["depth"].append(2), lambda: config.inner["depth"].pop()),
        (lambda: delattr(model, "number"), lambda: setattr(model, "number", 1)),
    ]
    for change, undo in changes:
        change()
        assert not guards.hold()
        undo()
        assert guards.hold()
    handle = model.op[0].register_forward_hook(lambda *_: None)
    assert not guards.hold()
    handle.remove()
    assert guards.hold()
    model.op[0].__class__ = type("Other", (nn.Conv2d,), {})
    assert not guards.hold()
    model.op[0].__class__ = nn.Conv2d
    assert guards.hold()
    model.op[0] = conv(1)
    assert not guards.hold()


def test_containers_are_put_back() -> None:
    model: Any = of(plain)
    model.items = [1]
    guards = Guards()
    guards.saw(model, "items", model.items)
    guards.require_containers_unchanged()
    model.items.append(2)
    with pytest.raises(NotTraceable, match=r"changes plain\.items in forward"):
        guards.require_containers_unchanged()
    assert model.items == [1]


def test_fingerprints() -> None:
    assert fingerprint([1, {"a": (2.0, None)}]) == fingerprint([1, {"a": (2.0, None)}])
    assert fingerprint(1) != fingerprint(True)
    assert fingerprint({1, 2}) != fingerprint({1})
    assert fingerprint(object()) != fingerprint(object())
    cyclic = Config()
    cyclic.inner = {"self": cyclic}  # type: ignore[dict-item]
    assert fingerprint(cyclic) == fingerprint(cyclic)


class Slotted(Config):
    __slots__ = ("factor", "unset")

    def __init__(self) -> None:
        super().__init__()
        self.factor = [1]


MAKERS = [lambda: [1, 2], lambda: {"a": 1}, lambda: {1, 2}, lambda: deque([1, 2]), Config, Slotted]


@pytest.mark.parametrize("make", MAKERS)
def test_snapshots(make: Any) -> None:
    value = make()
    assert is_changeable(value)
    before = snapshot(value)
    assert is_unchanged(value, before)
    if isinstance(value, list | deque):
        value[0] = 5
    elif isinstance(value, dict):
        value["a"] = 5
    elif isinstance(value, set):
        value.add(5)
    elif isinstance(value, Slotted):
        value.factor.append(2)
        value.unset = 1
    else:
        value.inner["new"] = 5
    assert not is_unchanged(value, before)
    put_back(value, before)
    assert is_unchanged(value, before)
    fresh = make()
    assert value == fresh if not isinstance(value, Config) else state(value) == state(fresh)


def test_what_is_not_looked_into() -> None:
    for value in (3, "a", None, torch.ones(1), nn.ReLU(), len, Config, numpy.ones(1)):
        assert not is_changeable(value)


# ----- calls


def test_call_shapes() -> None:
    one, two = torch.ones(1), torch.zeros(2, 3)
    assert call_shape((one, 2.0), {"k": [one]}) == call_shape((two, 3.0), {"k": [two]})
    assert call_shape((one, 2), {}) != call_shape((one, 3), {})
    assert call_shape((one, None), {}) != call_shape((one, two), {})
    assert call_shape(([one],), {}) != call_shape(((one,),), {})
    assert guessed_shape(lambda x, y=None: x) == call_shape((one,), {})
