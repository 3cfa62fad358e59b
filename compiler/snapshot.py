"""Remembers what a Python object of a model holds, notices changes and undoes them."""

from __future__ import annotations

import copy
import functools
import sys
from collections import ChainMap, UserDict, UserList, deque
from types import MemberDescriptorType
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque)
WRAPPERS = (UserDict, UserList, ChainMap)
"""Containers of Python's library that are objects with their content in an attribute."""
# argparse.Namespace and types.SimpleNamespace are settings of a user
_LIBRARIES = {"torch", "numpy", "nascompile", *sys.stdlib_module_names} - {"argparse", "types"}


def is_foreign(module: str) -> bool:
    """Whether a module, by its name, belongs to Python, torch, NumPy or nascompile, but not to its spaces,
    which are models like others."""
    return module.partition(".")[0] in _LIBRARIES and not module.startswith("nascompile.spaces")


def is_changeable(value: Any) -> bool:
    """Whether `value` is a container, or an instance of a user's class with attributes to change."""
    if isinstance(value, (*_CONTAINERS, *WRAPPERS)):
        return True
    if isinstance(value, type | nn.Module | Tensor) or is_foreign(type(value).__module__):
        return False
    return _dictionary(value) is not None or bool(_slots(type(value)))


def state(value: Any) -> dict[str, Any]:
    """The attributes of an object, in its dictionary and in slots, read without running any of the user's
    code."""
    found = dict(_dictionary(value) or {})
    for name, slot in _slots(type(value)).items():
        try:
            found[name] = slot.__get__(value)
        except AttributeError:
            # a slot without a value
            continue
    return found


def attributes_besides(container: Any) -> dict[str, Any]:
    """The attributes of an instance of a user's subclass of list, dict or another container."""
    return {} if is_foreign(type(container).__module__) else state(container)


def snapshot(value: Any) -> Any:
    """What a changeable object holds now: its items, or its attributes and the items of those."""
    if isinstance(value, _CONTAINERS):
        return copy.copy(value)
    attributes = state(value)
    return attributes, {
        name: copy.copy(held) for name, held in attributes.items() if isinstance(held, _CONTAINERS)
    }


def is_unchanged(value: Any, before: Any) -> bool:
    """Whether a changeable object holds the very same things as when `before` was taken."""
    if isinstance(value, _CONTAINERS):
        return _identities(value) == _identities(before)
    attributes, contents = before
    held = state(value)
    return _identities(held) == _identities(attributes) and all(
        _identities(held[name]) == _identities(content) for name, content in contents.items()
    )


def put_back(value: Any, before: Any) -> None:
    """Make a changeable object hold again what it held."""
    if not isinstance(value, _CONTAINERS):
        attributes, contents = before
        _put_attributes_back(value, attributes)
        for name, content in contents.items():
            put_back(attributes[name], content)
    elif isinstance(value, list):
        value[:] = before
    else:
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(before)


def _put_attributes_back(value: Any, attributes: dict[str, Any]) -> None:
    held, slots = _dictionary(value), _slots(type(value))
    if held is not None:
        put_back(held, {name: one for name, one in attributes.items() if name not in slots})
    now = state(value)
    for name, slot in slots.items():
        if name in attributes:
            slot.__set__(value, attributes[name])
        elif name in now:
            slot.__delete__(value)


def _dictionary(value: Any) -> dict[str, Any] | None:
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


@functools.lru_cache(maxsize=256)
def _slots(kind: type) -> dict[str, Any]:
    return {
        name: slot
        for one in reversed(kind.__mro__)
        if "__slots__" in one.__dict__
        for name, slot in one.__dict__.items()
        if isinstance(slot, MemberDescriptorType)
    }


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return (
        {id(value) for value in container}
        if isinstance(container, set)
        else [id(value) for value in container]
    )
