"""Functions, globals, constants and objects that a forward uses are replaced after compiling, and seen."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.compiler.unit import ENTRY_LIMIT
from nascompile.mutables import LayerChoice
from tests.compiler import replaced_names
from tests.compiler.replacing import Change, Use, assert_seen, compiled

SCALE = 2.0
TABLE = {"factors": {"first": 1.0}}
BOXED: Any = None


class Slotted:
    __slots__ = ("factor", "unset")

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor


class Scaling:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


@dataclasses.dataclass(slots=True)
class Settings:
    factor: float = 2.0


BOXED = Settings()


def helper(x: Tensor) -> Tensor:
    return x * 2


def through_another(x: Tensor) -> Tensor:
    return helper(x)


def with_default(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def scaled_by(factor: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    def scale(x: Tensor) -> Tensor:
        return x * factor

    def change(other: float) -> None:
        nonlocal factor
        factor = other

    return scale, change


class Base(nn.Module):
    factor = 2.0
    rates = {"first": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))])
        self.act: Callable[..., Any] = F.relu
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.table: dict[str, Any] = {"acts": [F.relu]}
        self.pair = (F.relu, F.tanh)
        self.slotted = Slotted(2.0)
        self.scaling = Scaling(2.0)
        self.queue = deque([2.0])
        self.bound = self.slotted.scaled
        self.closure, self.change_closure = scaled_by(2.0)

    def helper(self, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x * 2

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * cls.factor

    @property
    def computed(self) -> float:
        return 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.op(x))

    def use(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Derived(Base):
    def helper(self, x: Tensor) -> Tensor:
        return super().helper(x) + 1


def this() -> Any:
    return globals()


def puts(name: str, value: Any) -> Change:
    return lambda model, patch: setattr(model, name, value)


def patches(where: Any, name: str, value: Any) -> Change:
    return lambda model, patch: patch.setattr(where, name, value)


def patches_global(name: str, value: Any) -> Change:
    return lambda model, patch: patch.setitem(this(), name, value)


def imports(x: Tensor) -> Tensor:
    from tests.compiler.replaced_names import FACTOR

    return x * FACTOR


@decorated
def in_decorator(x: Tensor) -> Tensor:
    return x * SCALE


CASES: dict[str, tuple[Use, Change]] = {
    "a function": (lambda self, x: self.act(x), puts("act", F.gelu)),
    "a function by a lambda": (lambda self, x: self.act(x), puts("act", lambda x: x * 3)),
    "a partial function": (
        lambda self, x: self.partial(x),
        puts("partial", functools.partial(F.leaky_relu, negative_slope=0.5)),
    ),
    "a function in a list in a dict": (
        lambda self, x: self.table["acts"][0](x),
        lambda model, patch: model.table["acts"].__setitem__(0, F.gelu),
    ),
    "functions in a tuple": (lambda self, x: self.pair[0](x), puts("pair", (F.tanh, F.relu))),
    "a bound method": (lambda self, x: self.bound(x), puts("bound", Slotted(3.0).scaled)),
    "what a bound method reads": (
        lambda self, x: self.bound(x),
        lambda model, patch: setattr(model.slotted, "factor", 3.0),
    ),
    "an item of a deque": (
        lambda self, x: x * self.queue[0],
        lambda model, patch: model.queue.appendleft(3.0),
    ),
    "a callable object's attribute": (
        lambda self, x: self.scaling(x),
        lambda model, patch: setattr(model.scaling, "factor", 3.0),
    ),
    "a callable object's call": (
        lambda self, x: self.scaling(x),
        patches(Scaling, "__call__", lambda self, x: x * 3),
    ),
    "a variable of an enclosing function": (
        lambda self, x: self.closure(x),
        lambda model, patch: model.change_closure(3.0),
    ),
    "the code of a function": (
        lambda self, x: with_default(x),
        patches(with_default, "__code__", (lambda x, factor=2.0: x * 5).__code__),
    ),
    "a default": (lambda self, x: with_default(x), patches(with_default, "__defaults__", (3.0,))),
    "a method of the class": (lambda self, x: self.helper(x), patches(Base, "helper", lambda self, x: x * 3)),
    "a method of the instance": (
        lambda self, x: self.helper(x),
        lambda model, patch: setattr(model, "helper", types.MethodType(lambda self, x: x * 3, model)),
    ),
    "a method that hides one of the base": (
        lambda self, x: self.static(x),
        lambda model, patch: patch.setattr(Derived, "static", staticmethod(lambda x: x * 3), raising=False),
    ),
    "a method by super": (
        lambda self, x: Derived.helper(self, x),
        patches(Base, "helper", lambda self, x: x * 3),
    ),
    "a method by its computed name": (
        lambda self, x: getattr(self, "help" + "er")(x),
        patches(Base, "helper", lambda self, x: x * 3),
    ),
    "a static method": (
        lambda self, x: self.static(x),
        patches(Base, "static", staticmethod(lambda x: x * 3)),
    ),
    "a property": (lambda self, x: x * self.computed, patches(Base, "computed", property(lambda self: 3.0))),
    "a constant by a class method": (lambda self, x: self.of_class(x), patches(Base, "factor", 3.0)),
    "a constant of a class": (lambda self, x: x * Base.factor, patches(Base, "factor", 3.0)),
    "an item of a table of the class": (
        lambda self, x: x * Base.rates["first"],
        lambda model, patch: patch.setitem(Base.rates, "first", 3.0),
    ),
    "a constant of another class": (
        lambda self, x: x + replaced_names.Constants.shift,
        patches(replaced_names.Constants, "shift", 3.0),
    ),
    "a global number": (lambda self, x: x * SCALE, patches_global("SCALE", 3.0)),
    "a global number of a decorated function": (
        lambda self, x: in_decorator(x),
        patches_global("SCALE", 3.0),
    ),
    "a global of a Python module": (
        lambda self, x: x * replaced_names.FACTOR,
        patches(replaced_names, "FACTOR", 3.0),
    ),
    "an import in a function": (lambda self, x: imports(x), patches(replaced_names, "FACTOR", 3.0)),
    "an item of a global table": (
        lambda self, x: x * TABLE["factors"]["first"],
        lambda model, patch: patch.setitem(TABLE["factors"], "first", 3.0),
    ),
    "a global function": (lambda self, x: helper(x), patches_global("helper", lambda x: x * 3)),
    "a function that a function calls": (
        lambda self, x: through_another(x),
        patches_global("helper", lambda x: x * 3),
    ),
    "a slot": (
        lambda self, x: x * self.slotted.factor,
        lambda model, patch: setattr(model.slotted, "factor", 3.0),
    ),
    "an object with slots": (lambda self, x: x * self.slotted.factor, puts("slotted", Slotted(3.0))),
    "a method of an object": (
        lambda self, x: self.slotted.scaled(x),
        patches(Slotted, "scaled", lambda self, x: x * 3),
    ),
    "a slot of a global": (
        lambda self, x: x * BOXED.factor,
        lambda model, patch: patch.setattr(BOXED, "factor", 3.0),
    ),
    "a slot that gets a value": (
        lambda self, x: x * getattr(self.slotted, "unset", 2.0),
        lambda model, patch: setattr(model.slotted, "unset", 3.0),
    ),
}


@pytest.mark.parametrize(("use", "change"), CASES.values(), ids=CASES)
def test_what_is_replaced_is_seen(use: Use, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_seen(Derived, use, change, monkeypatch)


UNREAD: dict[str, Change] = {
    "an equal number": patches_global("SCALE", float("2.0")),
    "a global that has the name of an attribute": lambda model, patch: patch.setitem(this(), "act", 1),
    "an attribute that nothing reads": puts("epoch", 1),
    "a method that nothing calls": patches(Base, "static", staticmethod(lambda x: x * 3)),
}


@pytest.mark.parametrize("change", UNREAD.values(), ids=UNREAD)
def test_what_is_not_read_makes_no_trace(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network, x = compiled(Derived, lambda self, x: self.helper(self.act(x)) * SCALE)
    network(x)
    network(x)
    change(model, monkeypatch)
    torch.testing.assert_close(network(x), model(x))
    assert len(network.entries) == 1


COUNT = 0


def counts(self: Any, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return self.op(x) * COUNT


def test_a_forward_that_assigns_a_global_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Derived, "forward", counts)
    monkeypatch.setitem(this(), "COUNT", 0)
    _, network, x = compiled(Derived, lambda self, x: x)
    ones = [network(x) for _ in range(3)]
    assert COUNT == 3
    torch.testing.assert_close(ones[2], 3 * ones[0])
    assert "assigns the global COUNT" in network.islands[0].reason


CALLS = 0


def counted(x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return x * CALLS


def test_a_function_that_counts_its_calls_runs_as_written_after_many_traces() -> None:
    model, network, x = compiled(Derived, lambda self, x: counted(x))
    for _ in range(ENTRY_LIMIT + 1):
        network(x)
    one, other = network(x), model(x)
    torch.testing.assert_close(other, one * CALLS / (CALLS - 1))
    assert "is called in more than 16 ways" in network.islands[0].reason


LARGE = {str(number): 2.0 for number in range(1000)}


def test_of_a_large_table_the_length_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, network, x = compiled(Derived, lambda self, x: x * (LARGE["0"] if "new" not in LARGE else 3.0))
    network(x)
    monkeypatch.setitem(LARGE, "new", 1.0)
    torch.testing.assert_close(network(x), model(x))
    assert len(network.entries) == 2
