"""What was None or missing when a forward was traced, and comes later, and what goes, is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile.mutables import LayerChoice
from tests.compiler import replaced_names
from tests.compiler.replacing import Change, Use, assert_seen, compiled


class Settings:
    scale = 2.0


class Derived(Settings):
    pass


SETTINGS = Derived()


def tensor(value: float) -> Tensor:
    return torch.tensor([float(value)])


class Candidate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * getattr(self, "factor", 2.0)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([Candidate(), Candidate()])
        self.inner = nn.ReLU()
        self.plain = tensor(2)
        self.register_parameter("unset", None)
        self.register_buffer("unset_buffer", None)
        self.weight = nn.Parameter(tensor(2))
        self.register_buffer("buffer", tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.op(x))

    def use(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def scaled_or_not(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def tries(self: Any, x: Tensor) -> Tensor:
    try:
        return x * self.absent
    except AttributeError:
        return x


def asks(x: Tensor) -> Tensor:
    return x * 2 if any(hasattr(SETTINGS, name) for name in ("absent", "other")) else x


def puts(name: str, value: Any) -> Change:
    return lambda model, patch: setattr(model, name, value)


def puts_on_class(name: str, value: Any) -> Change:
    return lambda model, patch: patch.setattr(Base, name, value, raising=False)


CASES: dict[str, tuple[Use, Change]] = {
    "a parameter in the place of None": (
        lambda self, x: scaled_or_not(x, self.unset),
        lambda model, patch: setattr(model, "unset", nn.Parameter(tensor(3))),
    ),
    "None in the place of a parameter": (lambda self, x: scaled_or_not(x, self.weight), puts("weight", None)),
    "a buffer in the place of None": (
        lambda self, x: scaled_or_not(x, self.unset_buffer),
        puts("unset_buffer", tensor(3)),
    ),
    "None in the place of a buffer": (lambda self, x: scaled_or_not(x, self.buffer), puts("buffer", None)),
    "None in the place of a tensor": (lambda self, x: scaled_or_not(x, self.plain), puts("plain", None)),
    "a number of the class that hides a parameter": (
        lambda self, x: scaled_or_not(x, self.weight),
        puts_on_class("weight", 3.0),
    ),
    "an attribute": (lambda self, x: x * getattr(self, "absent", 2.0), puts("absent", 3.0)),
    "a question": (lambda self, x: x * 2 if hasattr(self, "absent") else x, puts("absent", 3.0)),
    "an attempt": (tries, puts("absent", 3.0)),
    "an attribute of a layer": (
        lambda self, x: x * getattr(self.inner, "absent", 2.0),
        lambda model, patch: setattr(model.inner, "absent", 3.0),
    ),
    "an attribute of a candidate": (
        lambda self, x: x,
        lambda model, patch: [setattr(one, "factor", 3.0) for one in model.op],
    ),
    "an attribute of the class": (
        lambda self, x: x * getattr(self, "absent", 2.0),
        puts_on_class("absent", 3.0),
    ),
    "a parameter": (
        lambda self, x: x * getattr(self, "absent", 2.0),
        lambda model, patch: setattr(model, "absent", nn.Parameter(tensor(3))),
    ),
    "a buffer of a layer": (
        lambda self, x: x * getattr(self.inner, "absent", 2.0),
        lambda model, patch: model.inner.register_buffer("absent", tensor(3)),
    ),
    "a module of a layer": (
        lambda self, x: x * 2 if hasattr(self.inner, "absent") else x,
        lambda model, patch: setattr(model.inner, "absent", nn.ReLU()),
    ),
    "what hides a default of the class": (
        lambda self, x: x * SETTINGS.scale,
        lambda model, patch: patch.setitem(vars(SETTINGS), "scale", 3.0),
    ),
    "what hides a default of the base": (
        lambda self, x: x * SETTINGS.scale,
        lambda model, patch: patch.setattr(Derived, "scale", 3.0),
    ),
    "an attribute of a global object": (
        lambda self, x: x * getattr(SETTINGS, "absent", 2.0),
        lambda model, patch: patch.setattr(SETTINGS, "absent", 3.0, raising=False),
    ),
    "an attribute of a global object's class": (
        lambda self, x: x * getattr(SETTINGS, "absent", 2.0),
        lambda model, patch: patch.setattr(Settings, "absent", 3.0, raising=False),
    ),
    "an attribute of a global object, asked for": (
        lambda self, x: asks(x),
        lambda model, patch: patch.setattr(SETTINGS, "other", 3.0, raising=False),
    ),
    "an item of a global object's dictionary": (
        lambda self, x: x * vars(SETTINGS).get("absent", 2.0),
        lambda model, patch: patch.setattr(SETTINGS, "absent", 3.0, raising=False),
    ),
    "a global of a Python module": (
        lambda self, x: x * getattr(replaced_names, "absent", 2.0),
        lambda model, patch: patch.setattr(replaced_names, "absent", 3.0, raising=False),
    ),
}


@pytest.mark.parametrize(("use", "change"), CASES.values(), ids=CASES)
def test_what_comes_and_goes_is_seen(use: Use, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_seen(Base, use, change, monkeypatch)


OTHERS: dict[str, Change] = {
    "another parameter": lambda model, patch: setattr(model, "weight", nn.Parameter(tensor(3))),
    "another buffer": puts("buffer", tensor(3)),
    "another tensor": puts("plain", tensor(3)),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_other_tensors_make_no_trace(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network, x = compiled(Base, lambda self, x: x * self.weight + self.buffer * self.plain)
    before = network(x)
    change(model, monkeypatch)
    torch.testing.assert_close(network(x), model(x))
    assert not torch.allclose(before, model(x))
    assert len(network.entries) == 1
