"""`nascompile.compile`: the same model, the same parameters, a faster forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn

from nascompile.compiler.errors import TraceError
from nascompile.compiler.islands import Island, where_defined
from nascompile.compiler.lower import gives_nothing, lowered
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable
from nascompile.compiler.passes.fuse_weighted_sums import first_pattern
from nascompile.compiler.region.show import describe
from nascompile.compiler.space import read_space, unwrap
from nascompile.compiler.unit import Entry, Unit, listens_to_scopes, scope_mutator
from nascompile.compiler.verify import difference

REQUIREMENTS = ("traced", "fused")


def compile(
    model: nn.Module, example_inputs: Any = None, *, require: str | None = None, skip: Sequence[str] = ()
) -> CompiledModel:
    """Compile a model with choices. The result computes the same function with the very same parameters.

    example_inputs: a tensor, or a tuple of the arguments of `forward`; without it tracing waits for the first
    call.
    require: "traced" raises TraceError unless the whole model was traced, "fused" also unless every
    weighted choice is fused. skip: names of passes to leave out. What runs as written, and why, is in
    `islands` and `notes`.
    """
    if require is not None and require not in REQUIREMENTS:
        raise TraceError(f"require is {require!r}, expected None or one of: {', '.join(REQUIREMENTS)}")
    if require is not None and example_inputs is None:
        raise TraceError(f'require="{require}" needs example_inputs')
    compiled = CompiledModel(model, skip=skip)
    if example_inputs is not None:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        compiled.trace(*args)
        compiled.check_requirement(require)
    return compiled


class CompiledModel(nn.Module):
    """A compiled model: parameters, buffers, sub-modules, mode and other attributes are those of the user's
    model.

    The mutator bound to the model decides, in every call anew; nothing is traced again when a decision
    changes. A call with other Python arguments, another mode or changed attributes is traced on first sight.
    """

    def __new__(cls, model: nn.Module, *, skip: Sequence[str] = ()) -> CompiledModel:
        # Python looks these up in the class
        has_items = any(hasattr(type(unwrap(model)), name) for name in ("__len__", "__getitem__", "__iter__"))
        kind: Any = CompiledContainer if has_items else cls
        return super().__new__(kind)

    def __init__(self, model: nn.Module, *, skip: Sequence[str] = ()) -> None:
        model = unwrap(model)
        read_space(model)
        self.__dict__["_eager"] = model
        self.__dict__["_skip"] = tuple(skip)
        mode = model.training
        super().__init__()
        model.training = mode
        # the same dictionaries, not copies: what is set, moved or replaced in one is so in the other
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]
        for name in _own_methods(type(model)):
            self.__dict__[name] = _method_of(self, getattr(model, name))
        self._forget()

    def _forget(self) -> None:
        self.__dict__["_unit"] = Unit(self._eager, "", skip=self._skip)
        self.__dict__["_inner"] = None
        self.__dict__["_depth"] = 0

    @property
    def training(self) -> bool:
        """The mode of the model."""
        return self._eager.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._eager.training = mode

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_eager" not in self.__dict__:
                raise
            return getattr(self.__dict__["_eager"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or isinstance(getattr(type(self), name, None), property)
        if own or "_unit" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._eager, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        clone = CompiledModel(copy.deepcopy(self._eager, memo), skip=self._skip)
        memo[id(self)] = clone
        return clone

    def __reduce__(self) -> Any:
        return _rebuild, (self._eager, self._skip)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's forward computes."""
        entry = self._entry(args, kwargs)
        if not entry.is_checked:
            self._check(entry, args, kwargs)
        return self._follow(entry, args, kwargs)

    def _follow(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._can_follow(entry):
            with self._overridden():
                return self._eager(*args, **kwargs)
        assert entry.function is not None
        with self._overridden() if self._calls_back(entry) else nullcontext():
            return entry.function(self._eager, *args, **kwargs)

    def trace_of(self, *args: Any, **kwargs: Any) -> Entry | str:
        """The trace that a call like this follows under any decision that leaves no choice empty: as long as
        it is the same, so is what is done. A string says which code runs as written, and may do anything."""
        entry = self._entry(args, kwargs)
        if entry.islands:
            return f"runs as written: {next(iter(entry.islands.values()))}"
        return "a mutator listens to scopes" if self._is_listened_to(entry) else entry

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Trace for a call like this, check the result against the eager model, and look into islands."""
        entry = self._entry(args, kwargs)
        self._check(entry, args, kwargs)
        if entry.islands:
            for unit in self._inner_units().values():
                if not unit.entries and any(
                    _lies_below(unit.path, island) for island in entry.islands.values()
                ):
                    unit.guess()

    def _check(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a fresh trace beside the eager model; where they differ, the model runs as written."""
        entry.is_checked = True
        if not entry.function and not self._inner_units():
            return
        problem = difference(self._eager, lambda *a, **k: self._follow(entry, a, k), args, kwargs)
        if problem is None:
            return
        entry.islands[""] = Island("", *where_defined(self._eager), problem)
        if entry.function is None:
            # what an island calls is at fault
            self.__dict__["_inner"] = {}
            self.__dict__.pop("_replaced", None)
        entry.function, entry.graph_module, entry.lowered = None, None, ()

    def check_requirement(self, require: str | None) -> None:
        """Raise TraceError unless the model is "traced" or "fused" as asked."""
        problems = [str(island) for island in self.islands] if require is not None else []
        if require == "fused":
            problems += [f"{path}: {reason}" for path, reason in self.notes.items()]
        if problems:
            raise TraceError(f'require="{require}" cannot be honoured: {"; ".join(problems)}')

    @property
    def entries(self) -> list[Entry]:
        """All traces made so far, those of the model itself first."""
        inner = self.__dict__["_inner"] or {}
        return [*self._unit.entries, *(entry for unit in inner.values() for entry in unit.entries)]

    @property
    def islands(self) -> list[Island]:
        """The modules whose forward runs as written, with file, line and reason."""
        return list(
            {island.path: island for entry in self.entries for island in entry.islands.values()}.values()
        )

    @property
    def notes(self) -> dict[str, str]:
        """By module path: why something is not looked into, shared or fused."""
        return {path: reason for entry in self.entries for path, reason in entry.notes.items()}

    @property
    def code(self) -> str:
        """The traces as readable Python."""
        graphs = [(e.graph_module.graph, e.rewrites) for e in self.entries if e.graph_module is not None]
        return "\n".join(
            f"# {rewrites}\n{graph.python_code('self').src.strip()}\n" for graph, rewrites in graphs
        )

    @property
    def plans(self) -> str:
        """The plans made so far, as text: memory, arithmetic, phases and steps."""
        found = [(region, plan) for e in self.entries for region in e.regions for plan in region.plans]
        return "\n\n".join(f"{region.__name__}: {describe(plan)}" for region, plan in found)

    def _entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        with self._plain():
            return self._unit.entry(args, kwargs)

    def _can_follow(self, entry: Entry) -> bool:
        """Whether the graph is the program for the current decision.

        It was traced with choices that have an output: where the decision chooses nothing, the program may
        take another way (`if x is not None`), so that it has to run as written.
        """
        if entry.function is None or self._is_listened_to(entry):
            return False
        return not any(gives_nothing(choice) for choice in entry.choices)

    def _is_listened_to(self, entry: Entry) -> bool:
        return entry.has_scopes and listens_to_scopes(scope_mutator(self._eager))

    def _calls_back(self, entry: Entry) -> bool:
        """Whether code outside the graph calls choices: islands, and candidates with choices of their own."""
        if entry.calls_back is None:
            visible = {choice.path for choice in entry.lowered}
            choices = [p for p, m in self._eager.named_modules() if isinstance(m, LayerChoice | InputChoice)]
            entry.calls_back = bool(entry.islands) or any(path not in visible for path in choices)
        return entry.calls_back

    def _inner_units(self) -> dict[nn.Module, Unit]:
        """Everything islands may call: each module that contains choices, with traces of its own."""
        if self.__dict__["_inner"] is None:
            self.__dict__["_inner"] = {
                module: Unit(self._eager, path, skip=self._skip)
                for path, module in self._eager.named_modules()
                if path and _is_callable_part(module)
            }
        return self.__dict__["_inner"]

    def _run_unit(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_to_be_repeated():
            return type(unit.module).forward(unit.module, *args, **kwargs)
        with self._plain():
            entry = unit.entry(args, kwargs)
        if not self._can_follow(entry):
            return type(unit.module).forward(unit.module, *args, **kwargs)
        assert entry.function is not None
        return entry.function(self._eager, *args, **kwargs)

    def _replacements(self) -> dict[nn.Module, Any]:
        if "_replaced" not in self.__dict__:
            found: dict[nn.Module, Any] = {}
            known: dict[Any, Any] = {}
            for path, module in self._eager.named_modules():
                if isinstance(module, LayerChoice | InputChoice) and "forward" not in module.__dict__:
                    found[module] = _choice_forward(module, path, known)
            for module, unit in self._inner_units().items():
                found[module] = _unit_forward(self, unit)
            self.__dict__["_replaced"] = found
        return self.__dict__["_replaced"]

    @contextmanager
    def _overridden(self) -> Iterator[None]:
        """Let choices and traced parts run compiled when the user's own code calls them."""
        replacements = self._replacements()
        self.__dict__["_depth"] += 1
        if self.__dict__["_depth"] == 1:
            _install(replacements)
        try:
            yield
        finally:
            self.__dict__["_depth"] -= 1
            if self.__dict__["_depth"] == 0:
                _remove(replacements)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The user's model as it is, for tracing and guards."""
        if self.__dict__["_depth"] == 0:
            yield
            return
        replacements = self._replacements()
        _remove(replacements)
        try:
            yield
        finally:
            _install(replacements)


class CompiledContainer(CompiledModel):
    """A compiled model that has items, as `nn.Sequential` has."""

    def __len__(self) -> int:
        return len(self._eager)

    def __getitem__(self, key: Any) -> Any:
        return self._eager[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._eager)

    def __contains__(self, item: Any) -> bool:
        return item in self._eager

    def __bool__(self) -> bool:
        return bool(self._eager)


def _own_methods(kind: type[nn.Module]) -> list[str]:
    """The methods of all modules (`train`, `state_dict`, ...) that a model has its own versions of."""
    above = kind.__mro__[: kind.__mro__.index(nn.Module)]
    common = {
        name for name, value in vars(nn.Module).items() if callable(value) and not name.startswith("__")
    }
    own = {name for one in above for name in vars(one)}
    return sorted((common & own) - set(vars(CompiledModel)))


def _method_of(compiled: CompiledModel, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the model; where it returns the model, as `train` does, the compiled one."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        return compiled if found is compiled._eager else found

    return call


def _rebuild(model: nn.Module, skip: tuple[str, ...]) -> CompiledModel:
    return CompiledModel(model, skip=skip)


def _is_callable_part(module: nn.Module) -> bool:
    container = isinstance(module, nn.ModuleList | nn.ModuleDict | LayerChoice | InputChoice)
    if container or "forward" in module.__dict__:
        return False
    return any(isinstance(child, Mutable) for child in module.modules() if child is not module)


def _lies_below(path: str, island: Island) -> bool:
    return not island.path or path.startswith(island.path + ".")


def _choice_forward(choice: Any, path: str, known: dict[Any, Any]) -> Any:
    target: Any = lowered(choice, path)
    target.pattern, _ = first_pattern(choice, known)
    shared = ([None] * len(choice),) if isinstance(choice, LayerChoice) else ()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if _is_to_be_repeated():
            return type(choice).forward(choice, *args, **kwargs)
        return target(*shared, *args, **kwargs)

    return forward


def _is_to_be_repeated() -> bool:
    """Whether hooks on saved tensors are active, as in checkpointing.

    It calls the user's code again in backward, where nothing is compiled, and wants the same operations.
    """
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    return autograd._top_saved_tensors_default_hooks(True) is not None


def _unit_forward(compiled: CompiledModel, unit: Unit) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled._run_unit(unit, args, kwargs)

    return forward


def _install(replacements: dict[nn.Module, Any]) -> None:
    for module, forward in replacements.items():
        module.__dict__["forward"] = forward


def _remove(replacements: dict[nn.Module, Any]) -> None:
    for module in replacements:
        module.__dict__.pop("forward", None)
