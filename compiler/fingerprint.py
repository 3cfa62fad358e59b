"""What of a Python value a trace depends on, in a form that can be compared."""

from __future__ import annotations

import functools
from array import array
from collections import deque
from types import MappingProxyType
from typing import Any

import numpy
from torch import Tensor, nn

from nascompile.compiler.snapshot import attributes_besides, is_changeable, state

_SMALL = 2**16  # bytes of an array that is compared by content; a larger one counts by identity
REGISTERED = ("_parameters", "_buffers", "_modules")
"""The dictionaries of a module in which Python finds what is no plain attribute."""
MISSING = object()
"""In the place of an attribute that a module does not have."""
HELD = object()
"""In the place of a tensor or module: which one it is, no trace depends on."""
COMPARED = (list, tuple, deque, dict, MappingProxyType, set, frozenset)
"""Containers that are compared by content."""
BUFFERS = numpy.ndarray | bytearray | array
"""Numbers in a row that may change in place."""
SCALARS = (bool, int, float, complex, str, bytes, type(None))
"""What is compared by type and value."""


class Same:
    """A value that counts by identity. It is kept, so that nothing else can be made in its place."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(value: Any, depth: int = 3) -> Any:
    """Equal for values that a trace cannot tell apart: scalars by value, containers by content, else by
    identity.

    An object of a user's class (a configuration) counts as changed when one of its attributes is, a partial
    function when its function or arguments are.
    """
    if isinstance(value, SCALARS):
        return (type(value), value)
    if isinstance(value, COMPARED):
        content = _content(value, depth)
        besides = attributes_besides(value) if depth and type(value) not in COMPARED else {}
        return (type(value), content, fingerprint(besides, depth - 1)) if besides else (type(value), content)
    if isinstance(value, bytearray | array) and memoryview(value).nbytes <= _SMALL:
        return (type(value), getattr(value, "typecode", ""), bytes(value))
    if isinstance(value, numpy.ndarray) and value.nbytes <= _SMALL and not value.dtype.hasobject:
        return (value.shape, value.dtype.str, value.tobytes())
    if type(value) is functools.partial:
        return (functools.partial, *(fingerprint(x, depth) for x in (value.func, value.args, value.keywords)))
    if depth and is_changeable(value):
        return (Same(value), fingerprint(state(value), depth - 1))
    return Same(value)


def _content(value: Any, depth: int) -> Any:
    if isinstance(value, dict | MappingProxyType):
        return tuple((key, fingerprint(item, depth)) for key, item in value.items())
    items = (fingerprint(item, depth) for item in value)
    return frozenset(items) if isinstance(value, set | frozenset) else tuple(items)


def is_fixed(value: Any) -> bool:
    """Whether a value that is the same object has the same fingerprint: nothing in it can change."""
    if isinstance(value, tuple | frozenset):
        return all(map(is_fixed, value)) and (type(value) in COMPARED or not is_changeable(value))
    is_open = isinstance(value, BUFFERS | MappingProxyType) or type(value) is functools.partial
    return not is_open and not is_changeable(value)


def attribute(module: nn.Module, name: str) -> Any:
    """A plain attribute of the module or of its class, else None where a parameter, buffer or module of that
    name is; HELD for any tensor or module there is, MISSING for none; without running any of the user's code.
    """
    held = object.__getattribute__(module, "__dict__")
    if name in held:
        return HELD if isinstance(held[name], Tensor) else held[name]
    for one in type(module).__mro__:
        if name in one.__dict__:
            return one.__dict__[name]
    for registered in (held.get(kind, ()) for kind in REGISTERED):
        if name in registered:
            return None if registered[name] is None else HELD
    return MISSING
