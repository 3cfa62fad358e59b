"""Remembers what a Python object of a model holds, notices changes and undoes them."""

from __future__ import annotations

import copy
from typing import Any

_CONTAINERS = (list, dict, set)
_FOREIGN = ("builtins", "collections", "torch", "numpy", "nascompile")


def is_changeable(value: Any) -> bool:
    """Whether `value` is a container, or an instance of a user's class with attributes to change."""
    if isinstance(value, _CONTAINERS):
        return True
    return (
        hasattr(value, "__dict__")
        and type(value).__module__.partition(".")[0] not in _FOREIGN
        and not callable(value)
    )


def snapshot(value: Any) -> Any:
    """What a changeable object holds now: its items, or its attributes and the items of those."""
    if isinstance(value, _CONTAINERS):
        return copy.copy(value)
    attributes = dict(vars(value))
    return attributes, {
        name: copy.copy(held) for name, held in attributes.items() if isinstance(held, _CONTAINERS)
    }


def is_unchanged(value: Any, before: Any) -> bool:
    """Whether a changeable object holds the very same things as when `before` was taken."""
    if isinstance(value, _CONTAINERS):
        return _identities(value) == _identities(before)
    attributes, contents = before
    held = vars(value)
    return _identities(held) == _identities(attributes) and all(
        _identities(held[name]) == _identities(content) for name, content in contents.items()
    )


def put_back(value: Any, before: Any) -> None:
    """Make a changeable object hold again what it held."""
    if not isinstance(value, _CONTAINERS):
        attributes, contents = before
        put_back(vars(value), attributes)
        for name, content in contents.items():
            put_back(attributes[name], content)
    elif isinstance(value, list):
        value[:] = before
    else:
        value.clear()
        value.update(before)


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return (
        {id(value) for value in container}
        if isinstance(container, set)
        else [id(value) for value in container]
    )
