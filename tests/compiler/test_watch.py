from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from nascompile.compiler.watch import Watch
from nascompile.kernels import native

needs_counts = pytest.mark.skipif(
    native.load()[0] is None or sys.version_info >= (3, 13),
    reason="needs the extension, and a Python that counts the changes of its dictionaries",
)


class One:
    pass


class Other:
    pass


class Changed:
    pass


CHANGES: dict[str, Callable[[Any, Any, Any], object]] = {
    "a value": lambda plain, ordered, thing: plain.update(a=2),
    "a new key": lambda plain, ordered, thing: plain.update(b=1),
    "a key less": lambda plain, ordered, thing: plain.pop("a"),
    "emptied": lambda plain, ordered, thing: plain.clear(),
    "an ordered one": lambda plain, ordered, thing: ordered.update(b=1),
    "an ordered one emptied": lambda plain, ordered, thing: ordered.clear(),
    "an attribute": lambda plain, ordered, thing: setattr(thing, "a", 1),
    "a class": lambda plain, ordered, thing: setattr(thing, "__class__", Other),
    "the dictionary of an object": lambda plain, ordered, thing: setattr(thing, "__dict__", {}),
    "an attribute of a class": lambda plain, ordered, thing: setattr(Changed, "a", plain),
}


@needs_counts
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_sees_changes(change: Callable[[Any, Any, Any], object]) -> None:
    plain, ordered, thing = {"a": 1}, OrderedDict(a=1), One()
    watch = Watch([plain, ordered, thing.__dict__, Changed], [thing])
    assert watch.holds()
    assert plain["a"] + ordered["a"] == 2
    assert watch.holds()
    change(plain, ordered, thing)
    assert not watch.holds()


def test_never_holds_for_other_containers() -> None:
    assert not Watch([[]], []).holds()  # type: ignore[list-item]


def test_keeps_what_it_looks_at_and_lets_cycles_go() -> None:
    thing = One()
    thing.__dict__["watch"] = Watch([thing.__dict__], [thing])
    gone = weakref.ref(thing)
    watch = thing.__dict__["watch"]
    del thing
    gc.collect()
    assert gone() is not None
    assert not watch.holds()
    del watch
    gc.collect()
    assert gone() is None
