"""The conditions of a trace, made ready for thousands of modules: most models change nothing between two
calls."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nascompile.compiler.fingerprint import HELD, MISSING, REGISTERED, attribute, fingerprint, is_fixed
from nascompile.compiler.watch import Watched

Attribute = tuple[nn.Module, str, Any, Any]
"""A module, the name of an attribute of it, the fingerprint of the value, and the value."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF = operator.itemgetter(*HOOKS)


class Entries:
    """That entries of dictionaries are the very objects they were: a thousand checks in some 60 us.

    `get(where, name)` looks one up.
    """

    def __init__(
        self, rows: Iterable[tuple[Any, str, Any]], get: Callable[[Any, str], Any] = dict.get
    ) -> None:
        self._get = get
        self._dicts, self._names, self._values = list[Any](), list[str](), list[Any]()
        for held, name, value in rows:
            self._dicts.append(held)
            self._names.append(name)
            self._values.append(value)

    def are_same(self) -> bool:
        """Whether all are; a missing entry counts as None."""
        return all(map(operator.is_, map(self._get, self._dicts, self._names), self._values))

    def are_other(self) -> bool:
        """Whether none is."""
        return all(map(operator.is_not, map(self._get, self._dicts, self._names), self._values))


class _Lists:
    """That attributes are lists of the items that they had: all at once, most are never changed."""

    def __init__(self, rows: Collection[Attribute]) -> None:
        self._rows = rows
        self._lists = [value for *_, value in rows]
        self._entries = Entries((module.__dict__, name, value) for module, name, _, value in rows)
        self._lengths = list(map(len, self._lists))
        self._items = list(itertools.chain.from_iterable(self._lists))

    def are_same(self) -> bool:
        """Whether all have; a list that was replaced by an equal one counts as that."""
        if self._entries.are_same() and list(map(len, self._lists)) == self._lengths:
            items = itertools.chain.from_iterable(self._lists)
            if all(map(operator.is_, items, self._items)):
                return True
        return all(map(_is_as_before, self._rows))


class _Registered:
    """That parameters and buffers that were read are there, and those that were None are still: which need no
    look at the dictionaries of the modules, where training may put other tensors."""

    def __init__(self, rows: Iterable[Attribute]) -> None:
        places = [
            (module.__dict__[kind], row)
            for row in rows
            for module, name, *_ in [row]
            for kind in ("_parameters", "_buffers")
            if name in module.__dict__[kind]
        ]
        self._rows = [row for _, row in places]
        self._present = Entries((held, name, None) for held, (_, name, _, value) in places if value is HELD)
        self._absent = Entries((held, name, None) for held, (_, name, _, value) in places if value is None)

    def are_same(self) -> bool:
        """Whether they are; a parameter may have become a buffer."""
        return (self._present.are_other() and self._absent.are_same()) or all(map(_is_as_before, self._rows))


class ModelState:
    """That a model has its modules, in their places, and the attributes that the trace read.

    attributes: what was read. looked_into: modules that must keep their forward, without hooks. modules: all
    of the model.
    """

    def __init__(
        self,
        attributes: Collection[Attribute],
        looked_into: Collection[nn.Module],
        modules: Collection[nn.Module],
    ) -> None:
        self._own = [row for row in attributes if row[1] in row[0].__dict__ and is_fixed(row[3])]
        own = set(map(id, self._own))
        others = [row for row in attributes if id(row) not in own]
        self._fixed = [row for row in others if is_fixed(row[3])]
        self._registered = _Registered(row for row in self._fixed if row[3] is HELD or row[3] is None)
        # any of these may come to hold what was missing
        self._incomplete = [
            row[0].__dict__[kind] for row in others if row[3] is MISSING for kind in REGISTERED
        ]
        rest = [row for row in others if not is_fixed(row[3])]
        self._lists = _Lists([row for row in rest if _is_plain_list(row)])
        self._open = [row for row in rest if not _is_plain_list(row)]
        self._same = Entries((module.__dict__, name, value) for module, name, _, value in self._own)
        self._modules = list(modules)
        self._holders = [module.__dict__ for module in modules]
        self._dictionaries = Entries(
            (held, name, held.get(name)) for held in self._holders for name in REGISTERED
        )
        parents = [module._modules for module in modules if module._modules or _is_container(module)]
        self._children = list(zip(parents, map(len, parents), strict=True))
        # scripted modules have other containers
        self._placed = Entries(
            (held, name, child) for held in parents if isinstance(held, dict) for name, child in held.items()
        )
        self._looked_into = [module.__dict__ for module in looked_into]
        self._own_forward = Entries((held, "forward", held.get("forward")) for held in self._looked_into)
        self._classes = [(module, type(module)) for module in looked_into]
        self._forwards = _forwards(looked_into)
        read = {type(module) for module, *_ in attributes}
        self._kinds = {one for kind in read | set(self._forwards) for one in kind.__mro__} - {object}

    def is_same(self) -> bool:
        """Whether the modules, their places and what cannot change in itself are as before."""
        held = map(object.__getattribute__, self._modules, itertools.repeat("__dict__"))
        if not all(map(operator.is_, held, self._holders)) or not self._dictionaries.are_same():
            return False
        # a scalar that is another object may still be equal
        if not self._same.are_same() and not all(map(_is_as_before, self._own)):
            return False
        if not all(map(_is_as_before, self._fixed)) or not self._placed.are_same():
            return False
        if any(len(children) != length for children, length in self._children):
            return False
        return self._are_looked_into_alike()

    def holds_besides(self) -> bool:
        """Whether parameters that were read are there; whether containers, arrays and objects that were have
        their contents."""
        if not self._registered.are_same() or not self._lists.are_same():
            return False
        return all(map(_is_as_before, self._open))

    def watched(self) -> Iterator[Watched]:
        """The dictionaries of the modules and their classes."""
        yield from self._holders
        yield from (children for children, _ in self._children)
        yield from (hooks for held in self._looked_into for hooks in _HOOKS_OF(held))
        yield from self._kinds
        yield from self._incomplete

    def _are_looked_into_alike(self) -> bool:
        if not self._own_forward.are_same() or not _have_forwards(self._forwards):
            return False
        if any(type(module) is not kind for module, kind in self._classes):
            return False
        return not any(map(any, map(_HOOKS_OF, self._looked_into)))


class ModuleSettings:
    """That modules have the settings, hooks and parameters that they had; `names` gives the attributes of
    each."""

    def __init__(self, modules: Iterable[nn.Module], names: Callable[[nn.Module], Iterable[str]]) -> None:
        leaves = list(modules)
        plain = [
            (one.__dict__, name, one.__dict__[name])
            for one in leaves
            for name in names(one)
            if name in one.__dict__
        ]
        self._fixed = [row for row in plain if is_fixed(row[2])]
        self._same = Entries(self._fixed)
        lists = [row for row in plain if not is_fixed(row[2])]
        self._lists = Entries(lists)
        # what a list was before it changed in place
        self._copies = [(held, name, copy.deepcopy(value)) for held, name, value in lists]
        self._items = [(value, fingerprint(value)) for _, _, value in lists]
        self._modules = [module.__dict__ for module in leaves]
        self._leaves = leaves
        self._classes = list(map(type, leaves))
        self._forwards = _forwards(leaves)
        tensors = [
            (held, name, value)
            for module in leaves
            for held in (module._parameters, module._buffers)
            for name, value in held.items()
        ]
        self._absent = Entries((held, name, None) for held, name, value in tensors if value is None)
        self._present = Entries((held, name, None) for held, name, value in tensors if value is not None)
        self._own_forward = Entries((held, "forward", None) for held in self._modules)

    @contextmanager
    def as_they_were(self) -> Iterator[None]:
        """Let the modules have their settings again meanwhile."""
        before = [*self._fixed, *self._copies]
        changed = [(held, name, held[name]) for held, name, value in before if held[name] is not value]
        try:
            for held, name, value in before:
                held[name] = value
            yield
        finally:
            for held, name, value in changed:
                held[name] = value

    def is_same(self) -> bool:
        """Whether the settings are the same values, and no hook or parameter came or went."""
        if not self._lists.are_same():
            return False
        # a scalar that is another object may still be equal
        if not self._same.are_same() and any(
            fingerprint(held.get(name)) != fingerprint(value) for held, name, value in self._fixed
        ):
            return False
        if any(map(any, map(_HOOKS_OF, self._modules))) or not self._own_forward.are_same():
            return False
        if list(map(type, self._leaves)) != self._classes or not _have_forwards(self._forwards):
            return False
        return self._absent.are_same() and self._present.are_other()

    def holds_besides(self) -> bool:
        """Whether settings that are lists have their items."""
        return all(fingerprint(value) == before for value, before in self._items)

    def watched(self) -> Iterator[Watched]:
        """The dictionaries of the modules and their classes."""
        for held in self._modules:
            yield from (held, held["_parameters"], held["_buffers"], *_HOOKS_OF(held))
        yield from {one for kind in self._forwards for one in kind.__mro__} - {object}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks besides its forward."""
    return any(_HOOKS_OF(module.__dict__))


def _forwards(modules: Iterable[nn.Module]) -> dict[type[nn.Module], Any]:
    return {kind: kind.forward for kind in map(type, modules)}


def _have_forwards(forwards: dict[type[nn.Module], Any]) -> bool:
    return all(kind.forward is forward for kind, forward in forwards.items())


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _is_plain_list(row: Attribute) -> bool:
    module, name, _, value = row
    return type(value) is list and name in module.__dict__ and all(map(is_fixed, value))


def _is_as_before(row: Attribute) -> bool:
    module, name, expected, _ = row
    return fingerprint(attribute(module, name)) == expected
