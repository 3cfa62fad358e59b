"""The code that a trace ran through, and what it may have read besides attributes of modules: globals,
constants of classes, other functions."""

from __future__ import annotations

import functools
import operator
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

from torch import nn

from nascompile.compiler.checks import Entries
from nascompile.compiler.fingerprint import BUFFERS, SCALARS, Same, fingerprint, is_fixed
from nascompile.compiler.names import is_foreign_function, names_in
from nascompile.compiler.snapshot import WRAPPERS, attributes_besides, is_changeable, is_foreign, state
from nascompile.compiler.watch import Watched

FUNCTION_LIMIT = 1000  # functions looked into, the nearest first; each costs about 0.2 us in every call
SIZE_LIMIT = 256  # items of a container that is compared by content; a larger one counts by its length
_BODY = ("__code__", "__defaults__", "__kwdefaults__")
_CONTAINERS = list | tuple | dict | set | frozenset | deque | MappingProxyType
_EMPTY = object()


class _Walk:
    """Goes from classes and values to all that their code may reach: by names, so that it finds too much
    rather than too little."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self.names: set[str] = set()
        self.strings: set[str] = set()
        self.functions: list[FunctionType] = []
        self.globals: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
        self.cells: list[CellType] = []
        self.classes: list[type] = []
        self.modules: list[ModuleType] = []
        self.contents: list[Any] = []
        self.objects: list[Any] = []
        # kept, so that no other value gets the place of one
        self._seen: dict[int, Any] = {}
        self._todo = deque(roots)
        while self._todo:
            while self._todo:
                self._visit(self._todo.popleft())
            found = (value for holder in self._holders() for _, value in self.read_of(holder))
            self._todo.extend(value for value in found if self._is_new(value))

    def read_of(self, holder: Any) -> list[tuple[str, Any]]:
        """What code that was reached may read of a class, a Python module or an object."""
        held = vars(holder) if isinstance(holder, type | ModuleType) else state(holder)
        return [
            (name, value) for name, value in held.items() if name in self.names or _is_special(holder, name)
        ]

    def _is_new(self, value: Any) -> bool:
        return id(value) not in self._seen and not isinstance(value, SCALARS)

    def _holders(self) -> list[Any]:
        return [*self.classes, *self.modules, *self.objects]

    def _visit(self, value: Any) -> None:
        if not self._is_new(value):
            return
        self._seen[id(value)] = value
        if isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, ModuleType):
            self.modules += [] if is_foreign(value.__name__) else [value]
        elif isinstance(value, _CONTAINERS):
            self._visit_container(value)
        elif isinstance(value, BUFFERS):
            self.contents.append(value)
        elif isinstance(value, WRAPPERS):
            self.contents.append(value)
            self._todo += [type(value), *state(value).values()]
        elif is_changeable(value):
            self.objects.append(value)
            self._todo.append(type(value))
        else:
            self._todo.extend(_inside(value))

    def _visit_function(self, function: FunctionType) -> None:
        self._todo.append(function.__dict__.get("__wrapped__"))
        if is_foreign_function(function) or len(self.functions) == FUNCTION_LIMIT:
            return
        self.functions.append(function)
        names = names_in(function.__code__)
        self.names |= names.attributes | names.strings
        self.strings |= names.strings
        for name in names.globals:
            self.globals[id(function.__globals__), name] = function.__globals__, name
            self._todo.append(function.__globals__.get(name))
        self._todo.extend(sys.modules.get(name) for name in names.imports)
        self.cells += function.__closure__ or ()
        self._todo.extend(content_of(cell) for cell in function.__closure__ or ())
        self._todo += [function.__defaults__, function.__kwdefaults__]

    def _visit_class(self, kind: type) -> None:
        for one in kind.__mro__:
            if not is_foreign(one.__module__) and one not in self.classes:
                self.classes.append(one)

    def _visit_container(self, value: Any) -> None:
        if not is_fixed_container(value):
            self.contents.append(value)
        if is_small(value):
            self._todo += [type(value), *_items(value), *attributes_besides(value).values()]


class Code:
    """That the functions a trace ran through are the same, and what they read."""

    def __init__(self, walk: _Walk) -> None:
        self._globals = _Rows(
            [(held, name, held.get(name)) for held, name in walk.globals.values()]
            + [(vars(module), name, value) for module in walk.modules for name, value in walk.read_of(module)]
            + [
                (vars(module), name, None)
                for module in walk.modules
                for name in walk.strings - set(vars(module))
            ]
        )
        self._bodies = Entries(
            ((f, name, getattr(f, name)) for f in walk.functions for name in _BODY), getattr
        )
        self._cells = _Rows([(cell, "", content_of(cell)) for cell in walk.cells], content_of)
        self._classes = walk.classes
        self._constants = _Rows(_class_rows(walk), MappingProxyType.get)
        self._names = frozenset(walk.names)
        self._known = [self._names.intersection(vars(kind)) for kind in self._classes]
        self._objects = [(one, self._content_of(one)) for one in walk.objects]
        self._contents = [(value, _content(value)) for value in walk.contents]

    def is_same(self) -> bool:
        """Whether classes have the functions and constants that they had, and no others that may be read."""
        known = (self._names.intersection(vars(kind)) for kind in self._classes)
        return self._constants.are_same() and all(map(operator.eq, known, self._known))

    def holds_besides(self) -> bool:
        """Whether functions, globals, containers and objects are what they were."""
        if not self._globals.are_same() or not self._bodies.are_same() or not self._cells.are_same():
            return False
        if any(_content(value) != before for value, before in self._contents):
            return False
        return all(self._content_of(one) == before for one, before in self._objects)

    def watched(self) -> Iterator[Watched]:
        """The classes."""
        yield from self._classes

    def _content_of(self, value: Any) -> dict[str, Any]:
        # whatever the code names: an attribute may come and hide one of the class
        return {name: _content(held) for name, held in state(value).items() if name in self._names}


class _Rows:
    """Entries that may be other objects where they are equal numbers or strings."""

    def __init__(self, rows: list[tuple[Any, str, Any]], get: Any = dict.get) -> None:
        self._rows, self._get = rows, get
        self._same = Entries(rows, get)

    def are_same(self) -> bool:
        return self._same.are_same() or all(
            _is_equal(self._get(held, name), before) for held, name, before in self._rows
        )


def code_of(modules: Iterable[nn.Module], values: Iterable[Any]) -> Code:
    """What the forwards of modules and the functions among values, or in them, may run through and read."""
    kinds = dict.fromkeys(map(type, modules))
    # the contents of attributes are compared as those of the modules
    inside = (_items(one) if isinstance(one, _CONTAINERS) and is_small(one) else [one] for one in values)
    found = (one for items in inside for one in items if not isinstance(one, BUFFERS))
    return Code(_Walk([*kinds, *(kind.forward for kind in kinds), *found]))


def content_of(cell: CellType, _: str = "") -> Any:
    """What a variable of an enclosing function holds."""
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def is_small(value: Any) -> bool:
    """Whether a value and all that is in it are few enough to be compared in every call."""
    todo, count = [value], 0
    while todo and count <= SIZE_LIMIT:
        one = todo.pop()
        count += 1
        if isinstance(one, _CONTAINERS):
            todo.extend(_items(one))
            todo.extend(attributes_besides(one).values())
        elif is_changeable(one):
            todo.extend(state(one).values())
    return count <= SIZE_LIMIT


def is_fixed_container(value: Any) -> bool:
    """As `is_fixed`; a container of any size."""
    return isinstance(value, tuple | frozenset) and is_small(value) and is_fixed(value)


def _content(value: Any) -> Any:
    if is_small(value):
        return fingerprint(value)
    has_length = isinstance(value, _CONTAINERS) or type(value) in WRAPPERS
    return (Same(value), len(value)) if has_length else Same(value)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict | MappingProxyType) else value


def _inside(value: Any) -> list[Any]:
    """The functions in what can be called or read like one."""
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__, type(value.__self__)]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, functools.cached_property):
        return [value.func]
    return [value.__wrapped__] if isinstance(value, functools._lru_cache_wrapper) else []


def _is_special(holder: Any, name: str) -> bool:
    """Whether Python calls a method of a class by itself; the model has been made."""
    is_special = name.startswith("__") and name.endswith("__") and isinstance(holder, type)
    if not is_special or not isinstance(vars(holder)[name], FunctionType):
        return False
    return name != "__repr__" and not (name == "__init__" and issubclass(holder, nn.Module))


def _class_rows(walk: _Walk) -> list[tuple[Any, str, Any]]:
    read = {kind: {name for name, _ in walk.read_of(kind)} for kind in walk.classes}
    names = set[str]().union(*read.values())
    # a class that gets a method of its own hides that of its base
    return [(vars(kind), name, vars(kind).get(name)) for kind in walk.classes for name in names]


def _is_equal(now: Any, before: Any) -> bool:
    if now is before:
        return True
    return (
        isinstance(now, SCALARS) and isinstance(before, SCALARS) and fingerprint(now) == fingerprint(before)
    )
