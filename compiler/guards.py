"""What a trace took for granted: Python attributes it read, modules it looked into. While they hold, the
trace is valid."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
from torch import Tensor, nn

from nascompile.compiler.snapshot import is_changeable, is_unchanged, put_back, snapshot
from nascompile.compiler.watch import Glance

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_SMALL = 2**16  # bytes of an array that is compared by content; a larger one counts by identity
_MISSING = object()
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF = operator.itemgetter(*HOOKS)


class NotTraceable(Exception):
    """Raised inside a trace; the module whose forward is being traced becomes an island."""


def fingerprint(value: Any, depth: int = 3) -> Any:
    """Equal for values that a trace cannot tell apart: scalars by value, containers by content, else by id.

    An object of a user's class (a configuration) counts as changed when one of its plain attributes is.
    """
    if isinstance(value, _SCALARS):
        return (type(value), value)
    if isinstance(value, list | tuple):
        return (type(value), tuple(fingerprint(item, depth) for item in value))
    if isinstance(value, dict):
        return (type(value), tuple((key, fingerprint(item, depth)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return (type(value), frozenset(fingerprint(item, depth) for item in value))
    if isinstance(value, numpy.ndarray) and value.nbytes <= _SMALL and not value.dtype.hasobject:
        return (value.shape, value.dtype.str, value.tobytes())
    if depth and is_changeable(value):
        return (id(value), fingerprint(vars(value), depth - 1))
    return id(value)


class Guards:
    """The conditions under which a trace may be used again."""

    def __init__(self) -> None:
        self._attributes: dict[tuple[int, str], tuple[nn.Module, str, Any, Any]] = {}
        self._containers: dict[int, tuple[str, Any, Any]] = {}
        self._modules: dict[int, nn.Module] = {}
        self._places: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._checks: list[Callable[[], bool]] = []
        self._children: list[tuple[nn.Module, int]] = []
        self._fast: _Fast | None = None

    def saw(self, module: nn.Module, name: str, value: Any) -> None:
        """Record that the program read `module.name`."""
        if isinstance(value, nn.Module) or (id(module), name) in self._attributes:
            return
        expected = fingerprint(value)
        self._attributes[id(module), name] = (module, name, expected, value)
        if is_changeable(value):
            self._containers[id(value)] = (f"{type(module).__name__}.{name}", value, snapshot(value))

    def traced(self, module: nn.Module, place: tuple[dict[str, Any], str] | None = None) -> None:
        """Record that the trace looked into `module`: it must not gain hooks, nor leave its place in its
        parent."""
        if place is not None and id(module) not in self._modules:
            self._places.append((*place, module))
        self._modules[id(module)] = module

    def placed(self, module: nn.Module, place: tuple[dict[str, Any], str]) -> None:
        """Record that the trace counts on `module` at its place in its parent."""
        self._places.append((*place, module))

    def complete(self, model: nn.Module) -> None:
        """Record that no module of the model gains or loses children; the trace is over."""
        modules = list(model.modules())
        self._children = [(m, len(m._modules)) for m in modules if m._modules or _is_container(m)]
        # a container that is replaced takes its children along
        for held in [m._modules for m in modules if isinstance(m._modules, dict)]:
            self._places += [(held, name, child) for name, child in held.items() if child is not None]
        self._fast = self._make_fast()

    def also(self, check: Callable[[], bool]) -> None:
        """Record a condition of the trace that is quicker to check as a whole."""
        self._checks.append(check)

    def require_containers_unchanged(self) -> None:
        """Raise NotTraceable when the program changed a list or dict of the model; its content is put back
        first."""
        for name, container, content in self._containers.values():
            if not is_unchanged(container, content):
                put_back(container, content)
                raise NotTraceable(f"changes {name} in forward")

    def paths(self, names: dict[nn.Module, str]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        """What was read, as (module path, attribute), and the paths of the modules looked into."""
        read = tuple((names[module], name) for module, name, _, _ in self._attributes.values())
        return read, tuple(names[module] for module in self._modules.values())

    def mark(self) -> tuple[int, ...]:
        """How much has been taken for granted so far, for `forget_since`."""
        return len(self._attributes), len(self._containers), len(self._modules), len(self._places)

    def forget_since(self, mark: tuple[int, ...]) -> None:
        """Drop what was recorded after `mark`, except modes; containers get their content back."""
        attributes, containers, modules, places = mark
        for key in list(self._attributes)[attributes:]:
            if key[1] != "training":
                del self._attributes[key]
        for key in list(self._containers)[containers:]:
            _, container, content = self._containers.pop(key)
            put_back(container, content)
        for key in list(self._modules)[modules:]:
            del self._modules[key]
        del self._places[places:]

    def constants(self) -> dict[str, Any]:
        """The plain attributes that were read, by class and name; modes left out."""
        found = {}
        for module, name, _, value in self._attributes.values():
            if isinstance(value, _SCALARS) and name not in (
                "training",
                "_key",
                "reduction",
                "return_mask",
                "n_candidates",
            ):
                found[f"{type(module).__name__}.{name}"] = value
        return found

    def _make_fast(self) -> _Fast:
        return _Fast(
            *(self.mark(), self._attributes.values(), self._places),
            *(self._modules.values(), self._children),
        )

    def hold(self) -> bool:
        """Whether everything the trace took for granted is still so."""
        if self._fast is None or self._fast.mark != self.mark():
            self._fast = self._make_fast()
        return self._fast.holds() and all(check() for check in self._checks)


class Entries:
    """That entries of dictionaries are the very objects they were: a thousand checks in some 60 us."""

    def __init__(self, rows: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
        self._dicts, self._names, self._values = list[dict[str, Any]](), list[str](), list[Any]()
        for held, name, value in rows:
            self._dicts.append(held)
            self._names.append(name)
            self._values.append(value)

    def are_same(self) -> bool:
        """Whether all are; a missing entry counts as None."""
        return all(map(operator.is_, map(dict.get, self._dicts, self._names), self._values))

    def are_other(self) -> bool:
        """Whether none is."""
        return all(map(operator.is_not, map(dict.get, self._dicts, self._names), self._values))


class ModuleSettings:
    """That modules have the settings, hooks and parameters that they had; `names` gives the attributes of
    each."""

    def __init__(self, modules: Iterable[nn.Module], names: Callable[[nn.Module], Iterable[str]]) -> None:
        leaves = [(module, module.__dict__, names(module)) for module in modules]
        plain = [(held, name, held[name]) for _, held, known in leaves for name in known if name in held]
        self._plain = plain
        self._same = Entries(plain)
        self._modules = [held for _, held, _ in leaves]
        self._leaves = [module for module, _, _ in leaves]
        self._classes = list(map(type, self._leaves))
        self._forwards = [(kind, kind.forward) for kind in set(self._classes)]
        tensors = [
            (held, name, value)
            for module in self._leaves
            for held in (module._parameters, module._buffers)
            for name, value in held.items()
        ]
        self._absent = Entries((held, name, None) for held, name, value in tensors if value is None)
        self._present = Entries((held, name, None) for held, name, value in tensors if value is not None)
        self._own_forward = Entries((held, "forward", None) for held in self._modules)
        self._glance = Glance(self._hold, self._dicts, self._leaves)

    @contextmanager
    def as_they_were(self) -> Iterator[None]:
        """Let the modules have their settings again meanwhile."""
        changed = [(held, name, held[name]) for held, name, value in self._plain if held[name] is not value]
        try:
            for held, name, value in self._plain:
                held[name] = value
            yield
        finally:
            for held, name, value in changed:
                held[name] = value

    def hold(self) -> bool:
        """Whether nothing has changed."""
        return _have_forwards(self._forwards) and self._glance.holds()

    def _dicts(self) -> Iterator[dict[str, Any]]:
        for held in self._modules:
            yield from (held, held["_parameters"], held["_buffers"], *_HOOKS_OF(held))

    def _hold(self) -> bool:
        if not self._same.are_same() and any(held.get(name) != value for held, name, value in self._plain):
            return False
        if any(map(any, map(_HOOKS_OF, self._modules))) or not self._own_forward.are_same():
            return False
        if list(map(type, self._leaves)) != self._classes:
            return False
        return self._absent.are_same() and self._present.are_other()


class _Fast:
    """The checks of Guards, made ready: most models change nothing between two calls."""

    def __init__(
        self,
        mark: tuple[int, ...],
        attributes: Iterable[tuple[nn.Module, str, Any, Any]],
        places: Iterable[tuple[dict[str, Any], str, nn.Module]],
        modules: Iterable[nn.Module],
        children: Iterable[tuple[nn.Module, int]],
    ) -> None:
        self.mark = mark
        modules = list(modules)
        self._own_forward = Entries(
            (module.__dict__, "forward", module.__dict__.get("forward")) for module in modules
        )
        self._classes = [(module, type(module)) for module in modules]
        self._forwards = [(kind, kind.forward) for kind in set(map(type, modules))]
        self._children = [module._modules for module, _ in children]
        self._lengths = [length for _, length in children]
        scalars, self._others = (
            list[tuple[nn.Module, str, Any, Any]](),
            list[tuple[nn.Module, str, Any, Any]](),
        )
        for row in attributes:
            own = row[1] in row[0].__dict__
            (scalars if own and isinstance(row[3], _SCALARS) else self._others).append(row)
        self._scalars = scalars
        self._same = Entries((module.__dict__, name, value) for module, name, _, value in scalars)
        places = list(places)
        self._placed = Entries(places)
        self._modules = [module.__dict__ for module in modules]
        self._held = [held for held, _, _ in places]
        self._glance = Glance(self._hold, self._dicts, modules)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if not _have_forwards(self._forwards) or not self._glance.holds():
            return False
        return all(map(_is_as_before, self._others))

    def _dicts(self) -> Iterator[dict[str, Any]]:
        yield from (module.__dict__ for module, _, _, _ in self._scalars)
        yield from self._held
        yield from self._children
        for held in self._modules:
            yield from (held, *_HOOKS_OF(held))

    def _hold(self) -> bool:
        # a scalar that is another object may still be equal
        if not self._same.are_same() and not all(map(_is_as_before, self._scalars)):
            return False
        if not self._placed.are_same():
            return False
        if list(map(len, self._children)) != self._lengths or not self._own_forward.are_same():
            return False
        if any(type(module) is not kind for module, kind in self._classes):
            return False
        return not any(map(any, map(_HOOKS_OF, self._modules)))


def _have_forwards(forwards: Iterable[tuple[type[nn.Module], Any]]) -> bool:
    """Whether classes have the forward that they had."""
    return all(kind.forward is forward for kind, forward in forwards)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _is_as_before(row: tuple[nn.Module, str, Any, Any]) -> bool:
    module, name, expected, _ = row
    return fingerprint(attribute(module, name)) == expected


def attribute(module: nn.Module, name: str) -> Any:
    """A plain attribute of the module or of its class, read without running any of the user's code."""
    held = object.__getattribute__(module, "__dict__")
    if name in held:
        return held[name]
    return next((one.__dict__[name] for one in type(module).__mro__ if name in one.__dict__), _MISSING)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks besides its forward."""
    return any(_HOOKS_OF(module.__dict__))


@contextmanager
def watch_attributes(guards: Guards, tensor: Callable[[Tensor], Any]) -> Iterator[None]:
    """While tracing: record every Python attribute that a forward reads, and refuse those it assigns.

    `tensor` gives what the program gets for a tensor that is neither parameter nor buffer.
    """
    original_set: Callable[..., None] = nn.Module.__setattr__
    original_delete: Callable[..., None] = nn.Module.__delattr__

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name in _INTERNAL or name.startswith("__"):
            return value
        if isinstance(value, Tensor):
            return tensor(value)
        # what a property computes is not an attribute: what it reads is
        if attribute(module, name) is value and not callable(value):
            guards.saw(module, name, value)
        return value

    def refuse(module: nn.Module, name: str, *value: Any) -> None:
        raise NotTraceable(f"assigns {type(module).__name__}.{name} in forward")

    try:
        nn.Module.__getattribute__ = read
        nn.Module.__setattr__ = refuse  # type: ignore[assignment]
        nn.Module.__delattr__ = refuse  # type: ignore[method-assign]
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = original_set
        nn.Module.__delattr__ = original_delete
