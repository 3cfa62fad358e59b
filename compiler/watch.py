"""A quick look whether dictionaries and classes are what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nascompile.kernels import native


class Watch:
    """Remembers the present content of dictionaries, by Python's own count of their changes, and the classes
    of objects."""

    def __init__(self, dicts: Iterable[dict[str, Any]], objects: Iterable[Any]) -> None:
        # kept here, where the garbage collector sees them; the extension holds addresses
        self._dicts = list({id(one): one for one in dicts}.values())
        self._objects = list(objects)
        module, _ = native.load()
        # scripted modules have other containers
        can = module is not None and all(isinstance(one, dict) for one in self._dicts)
        self._watch = module.Watch(self._dicts, self._objects) if module is not None and can else None

    def holds(self) -> bool:
        """Whether nothing has changed, as far as can be told at a glance: False without the extension, from
        Python 3.13 on, which counts no changes, and for containers that are not dictionaries."""
        return self._watch is not None and self._watch.holds()


class Glance:
    """A check that depends on nothing but what a watch sees: while that is the same it is not repeated."""

    def __init__(
        self,
        check: Callable[[], bool],
        dicts: Callable[[], Iterable[dict[str, Any]]],
        objects: Iterable[Any],
    ) -> None:
        self._check, self._dicts, self._objects = check, dicts, list(objects)
        self._watch: Watch | None = None

    def holds(self) -> bool:
        """What the check says."""
        if self._watch is not None and self._watch.holds():
            return True
        # most traces that do not fit fail here, and are not worth a watch
        if not self._check():
            return False
        watch = Watch(self._dicts(), self._objects)
        # again: something may have changed before the watch was there
        holds = self._check()
        self._watch = watch if holds else None
        return holds
