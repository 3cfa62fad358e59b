"""The names that a piece of Python code looks up."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from nascompile.compiler.snapshot import is_foreign

_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_ASSIGNED = ("STORE_GLOBAL", "DELETE_GLOBAL")
# the last three from Python 3.12 on
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD")
# with these code may read an attribute whose name is a string
_BY_STRING = frozenset({"getattr", "hasattr", "vars", "attrgetter", "__dict__", "__getattribute__"})


@dataclass(frozen=True, slots=True)
class Names:
    """What code, with the functions defined in it, reads of its globals and of any object, what it imports,
    which globals it assigns, and what it may read by a string."""

    globals: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[str]
    assigned: frozenset[str]
    strings: frozenset[str]


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> Names:
    """The names in the instructions of some code."""
    found = [(one.opname, str(one.argval)) for one in dis.get_instructions(code)]

    def named(*kinds: str) -> frozenset[str]:
        return frozenset(name for kind, name in found if kind in kinds)

    own = Names(
        named(*_GLOBALS), named(*_ATTRIBUTES), named("IMPORT_NAME"), named(*_ASSIGNED), _strings(code)
    )
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return Names(
        own.globals.union(*(one.globals for one in inner)),
        own.attributes.union(*(one.attributes for one in inner)),
        own.imports.union(*(one.imports for one in inner)),
        own.assigned.union(*(one.assigned for one in inner)),
        own.strings.union(*(one.strings for one in inner)),
    )


def _strings(code: CodeType) -> frozenset[str]:
    # a name may stand here and be asked for in a generator
    if not _reads_by_string(code):
        return frozenset()
    found, todo = set[str](), list[Any](code.co_consts)
    while todo:
        one = todo.pop()
        if isinstance(one, tuple | frozenset):
            todo.extend(one)
        elif isinstance(one, str) and one.isidentifier():
            found.add(one)
    return frozenset(found)


def _reads_by_string(code: CodeType) -> bool:
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return not _BY_STRING.isdisjoint(code.co_names) or any(map(_reads_by_string, inner))


def is_foreign_function(function: FunctionType) -> bool:
    """Whether a function was written in a library whose code is not looked into."""
    # not its __module__: a decorator gives that of the function inside
    return is_foreign(str(function.__globals__.get("__name__", "")))


def is_own_method(found: Any) -> bool:
    """Whether what a class has under a name is a method or property of a user's."""
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    elif isinstance(found, property):
        found = found.fget
    return isinstance(found, FunctionType) and not is_foreign_function(found)


def assigned_globals(forward: Callable[..., Any]) -> frozenset[str]:
    """The globals that a user's forward assigns."""
    function = getattr(forward, "__func__", forward)
    if not isinstance(function, FunctionType) or is_foreign_function(function):
        return frozenset()
    return names_in(function.__code__).assigned
