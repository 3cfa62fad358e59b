"""A quick look whether dictionaries, classes and objects are what they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nascompile.kernels import native

Watched = dict[str, Any] | type
"""A dictionary, or a class for its own."""


class Watch:
    """Remembers the present content of dictionaries and classes, by Python's own count of their changes, and
    the classes and dictionaries that objects have."""

    def __init__(self, dicts: Iterable[Watched], objects: Iterable[Any]) -> None:
        # kept here, where the garbage collector sees them; the extension holds addresses
        self._dicts = list({id(one): one for one in dicts}.values())
        self._objects = list(objects)
        module, _ = native.load()
        # scripted modules have other containers
        can = module is not None and all(isinstance(one, dict | type) for one in self._dicts)
        self._watch = module.Watch(self._dicts, self._objects) if module is not None and can else None

    def holds(self) -> bool:
        """Whether nothing has changed, as far as can be told at a glance: False without the extension, from
        Python 3.13 on, which counts no changes, and for containers that are not dictionaries."""
        return self._watch is not None and self._watch.holds()


class Condition(Protocol):
    """Something a trace took for granted."""

    def is_same(self) -> bool:
        """Whether that is so which depends on nothing but what is watched, and on the objects' classes."""
        ...

    def holds_besides(self) -> bool:
        """Whether the rest is so, which no count of changes can tell."""
        ...

    def watched(self) -> Iterable[Watched]:
        """The dictionaries and classes that `is_same` looks into."""
        ...


class Glance:
    """All conditions of a trace: as long as what is watched is the same, they are not looked at again."""

    def __init__(self, conditions: Sequence[Condition], objects: Iterable[Any]) -> None:
        self._conditions, self._objects = conditions, list(objects)
        self._watch: Watch | None = None

    def holds(self) -> bool:
        """Whether all conditions hold."""
        return self._is_same() and all(one.holds_besides() for one in self._conditions)

    def _is_same(self) -> bool:
        if self._watch is not None and self._watch.holds():
            return True
        # most traces that do not fit fail here, and are not worth a watch
        if not self._look():
            return False
        watch = Watch((x for one in self._conditions for x in one.watched()), self._objects)
        # again: something may have changed before the watch was there
        holds = self._look()
        self._watch = watch if holds else None
        return holds

    def _look(self) -> bool:
        return all(one.is_same() for one in self._conditions)
