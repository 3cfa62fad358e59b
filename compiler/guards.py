"""What a trace took for granted: Python attributes it read, modules it looked into, code it ran. While they
hold, the trace is valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nascompile.compiler.checks import ModelState
from nascompile.compiler.code import code_of
from nascompile.compiler.fingerprint import SCALARS, attribute, fingerprint
from nascompile.compiler.names import is_own_method
from nascompile.compiler.patching import replaced_here
from nascompile.compiler.snapshot import is_changeable, is_unchanged, put_back, snapshot
from nascompile.compiler.watch import Condition, Glance

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}


class NotTraceable(Exception):
    """Raised inside a trace; the module whose forward is being traced becomes an island."""


class Guards:
    """The conditions under which a trace may be used again."""

    def __init__(self) -> None:
        self._attributes: dict[tuple[int, str], tuple[nn.Module, str, Any, Any]] = {}
        self._containers: dict[int, tuple[str, Any, Any]] = {}
        self._modules: dict[int, nn.Module] = {}
        self._model: list[nn.Module] = []
        self._conditions: list[Condition] = []
        self._covered = self.mark()
        self._glance = Glance([], [])

    def saw(self, module: nn.Module, name: str, value: Any) -> None:
        """Record that the program read `module.name`."""
        if isinstance(value, nn.Module) or (id(module), name) in self._attributes:
            return
        expected = fingerprint(value)
        self._attributes[id(module), name] = (module, name, expected, value)
        if is_changeable(value):
            self._containers[id(value)] = (f"{type(module).__name__}.{name}", value, snapshot(value))

    def traced(self, module: nn.Module) -> None:
        """Record that the trace looked into `module`: it must not gain hooks, nor another forward."""
        self._modules[id(module)] = module

    def complete(self, model: nn.Module) -> None:
        """Record the modules of the model and their places, and the code that was run; the trace is over."""
        self._model = list(model.modules())
        self.also(code_of(self._modules.values(), (value for *_, value in self._attributes.values())))
        self._cover(self._model)

    def also(self, condition: Condition) -> None:
        """Record a condition of the trace that is quicker to check as a whole."""
        self._conditions.append(condition)

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
        return len(self._attributes), len(self._containers), len(self._modules)

    def forget_since(self, mark: tuple[int, ...]) -> None:
        """Drop what was recorded after `mark`, except modes; containers get their content back."""
        attributes, containers, modules = mark
        for key in list(self._attributes)[attributes:]:
            if key[1] != "training":
                del self._attributes[key]
        for key in list(self._containers)[containers:]:
            _, container, content = self._containers.pop(key)
            put_back(container, content)
        for key in list(self._modules)[modules:]:
            del self._modules[key]

    def constants(self) -> dict[str, Any]:
        """The plain attributes that were read, by class and name; modes left out."""
        found = {}
        for module, name, _, value in self._attributes.values():
            if isinstance(value, SCALARS) and name not in (
                "training",
                "_key",
                "reduction",
                "return_mask",
                "n_candidates",
            ):
                found[f"{type(module).__name__}.{name}"] = value
        return found

    def hold(self) -> bool:
        """Whether everything the trace took for granted is still so."""
        # regions that run in parts look into modules later on
        if self._covered != self.mark():
            self._cover([])
        return self._glance.holds()

    def _cover(self, modules: list[nn.Module]) -> None:
        attributes, _, looked_into = self._covered
        self._covered = self.mark()
        read, found = list(self._attributes.values()), list(self._modules.values())
        self._conditions.append(ModelState(read[attributes:], found[looked_into:], modules))
        self._glance = Glance(self._conditions, self._model)


@contextmanager
def watch_attributes(guards: Guards, tensor: Callable[[Tensor], Any]) -> Iterator[None]:
    """While tracing: record every Python attribute that a forward reads, and refuse those it assigns.

    `tensor` gives what the program gets for a tensor that is neither parameter nor buffer.
    """

    def read(module: nn.Module, name: str) -> Any:
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            # modules count by their places, all together
            if not name.startswith("__") and name not in object.__getattribute__(module, "_modules"):
                guards.saw(module, name, attribute(module, name))
            raise
        if name in _INTERNAL or name.startswith("__"):
            return value
        found = attribute(module, name)
        if isinstance(value, Tensor):
            guards.saw(module, name, found)
            return tensor(value)
        # what a property computes is not an attribute: what it reads is, and its code
        if found is value or is_own_method(found):
            guards.saw(module, name, found)
        return value

    def refuse(module: nn.Module, name: str, *value: Any) -> None:
        raise NotTraceable(f"assigns {type(module).__name__}.{name} in forward")

    with ExitStack() as patches:
        watches = (("__getattribute__", read), ("__setattr__", refuse), ("__delattr__", refuse))
        for name, value in watches:
            patches.enter_context(replaced_here(nn.Module, name, value))
        yield
