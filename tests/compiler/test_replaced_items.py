"""Containers of Python's library and of users' subclasses that change in place after compiling are seen."""

from __future__ import annotations

import types
from array import array
from collections import ChainMap, UserDict

import pytest
from torch import Tensor, nn

from nascompile.mutables import LayerChoice
from tests.compiler.replacing import Change, Use, assert_seen


class Labelled(list[float]):
    label = 1.0

    def last(self) -> float:
        return self[-1]


class Named(dict[str, float]):
    label = 1.0


class Pair(tuple[float, ...]):
    label = 1.0


INNER = {"first": 1.0}
CHAINED = ChainMap({}, INNER)
PROXY = types.MappingProxyType(INNER)
WRAPPED = UserDict({"first": 1.0})
BYTES = bytearray([2])
ARRAY = array("d", [2.0])
LABELLED, NAMED, PAIR = Labelled([2.0]), Named(first=2.0), Pair([2.0])


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)])
        self.labelled = Labelled([2.0])
        self.wrapped = UserDict({"first": 1.0})
        self.bytes = bytearray([2])

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.op(x))

    def use(self, x: Tensor) -> Tensor:
        raise NotImplementedError


CASES: dict[str, tuple[Use, Change]] = {
    "an item of a UserDict": (
        lambda self, x: x * WRAPPED["first"],
        lambda model, patch: patch.setitem(WRAPPED, "first", 3.0),
    ),
    "an item of a ChainMap": (
        lambda self, x: x * CHAINED["first"],
        lambda model, patch: patch.setitem(INNER, "first", 3.0),
    ),
    "an item behind a proxy": (
        lambda self, x: x * PROXY["first"],
        lambda model, patch: patch.setitem(INNER, "first", 3.0),
    ),
    "an item of a bytearray": (
        lambda self, x: x * BYTES[0],
        lambda model, patch: BYTES.append(BYTES.pop(0) + 1),
    ),
    "an item of an array": (
        lambda self, x: x * ARRAY[0],
        lambda model, patch: ARRAY.append(ARRAY.pop(0) + 1),
    ),
    "an attribute of a list": (
        lambda self, x: x * LABELLED.label,
        lambda model, patch: patch.setattr(LABELLED, "label", 3.0),
    ),
    "an attribute of a dict": (
        lambda self, x: x * NAMED.label,
        lambda model, patch: patch.setattr(NAMED, "label", 3.0),
    ),
    "an attribute of a tuple": (
        lambda self, x: x * PAIR.label,
        lambda model, patch: patch.setattr(PAIR, "label", 3.0),
    ),
    "a method of a list": (
        lambda self, x: x * LABELLED.last(),
        lambda model, patch: patch.setattr(Labelled, "last", lambda self: 3.0),
    ),
    "an attribute of a list of the model": (
        lambda self, x: x * self.labelled.label,
        lambda model, patch: setattr(model.labelled, "label", 3.0),
    ),
    "an item of a UserDict of the model": (
        lambda self, x: x * self.wrapped["first"],
        lambda model, patch: model.wrapped.update(first=3.0),
    ),
    "an item of a bytearray of the model": (
        lambda self, x: x * self.bytes[0],
        lambda model, patch: model.bytes.append(model.bytes.pop() + 1),
    ),
}


@pytest.mark.parametrize(("use", "change"), CASES.values(), ids=CASES)
def test_what_changes_in_place_is_seen(use: Use, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_seen(Base, use, change, monkeypatch)
