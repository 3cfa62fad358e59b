"""One module of the model that is compiled on its own: the model itself, and what islands call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.parameter import is_lazy

from nascompile.compiler import pipeline
from nascompile.compiler.ambient import ambient_modes
from nascompile.compiler.codegen import as_function, graph_module
from nascompile.compiler.guards import Guards
from nascompile.compiler.islands import Island, where_defined
from nascompile.compiler.lower import LoweredChoice
from nascompile.compiler.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.compiler.mutator import BaseMutator
from nascompile.compiler.region.region import Region
from nascompile.compiler.signature import call_shape, guessed_shape, inputs_like
from nascompile.compiler.space import Choice, unwrap
from nascompile.compiler.trace import ModelTracer, own_forward

USES_PER_TRACE = 8  # below it, tracing again and again is not worth it
ENTRY_LIMIT = 16  # traces kept for one module; past it the module runs as written


@dataclass(slots=True)
class Entry:
    """One trace: for which calls it holds, and what runs then. `function` is None where the forward runs as
    written."""

    shape: Any
    guards: Guards
    function: Callable[..., Any] | None = None
    graph_module: fx.GraphModule | None = None
    lowered: tuple[LoweredChoice, ...] = ()
    regions: tuple[Region, ...] = ()
    choices: tuple[Choice, ...] = ()
    islands: dict[str, Island] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    rewrites: dict[str, int] = field(default_factory=dict)
    has_scopes: bool = False
    calls_back: bool | None = None
    is_checked: bool = False
    last_call: int = 0

    def suits(self, shape: Any) -> bool:
        """Whether this trace serves a call of that shape now."""
        return self.shape == shape and self.guards.hold()


class Unit:
    """A module and its traces. `path` is "" for the model; `skip` names passes to leave out."""

    def __init__(self, model: nn.Module, path: str, *, skip: Sequence[str] = ()) -> None:
        self.model = model
        self.path = path
        self.skip = tuple(skip)
        self.module = model.get_submodule(path)
        self.entries: list[Entry] = []
        self.gave_up: Entry | None = None
        self.calls = self.traces = 0
        self._may_be_lazy = True

    def entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The trace for a call; made when there is none yet."""
        if self.gave_up is not None:
            return self.gave_up
        if self._may_be_lazy and self._is_lazy():
            return self.entries[0]
        self.calls += 1
        shape = call_shape(args, kwargs), ambient_modes()
        for entry in self.entries:
            if entry.suits(shape):
                entry.last_call = self.calls
                return entry
        if len(self.entries) >= ENTRY_LIMIT and not self._make_room():
            return self._give_up(shape)
        forward = own_forward(self.module)
        return self._trace(
            shape, lambda t: t.trace_module(self.path, lambda u: inputs_like(u, forward, args, kwargs))
        )

    def _is_lazy(self) -> bool:
        """Whether parameters are missing that the first run creates; `entries` then says so."""
        self._may_be_lazy = any(
            is_lazy(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())
        )
        self.entries = []
        if self._may_be_lazy:
            reason = "has lazy modules: it is traced once it has run"
            island = Island(self.path, *where_defined(self.module), reason)
            self.entries = [Entry(None, Guards(), islands={self.path: island}, is_checked=True)]
        return self._may_be_lazy

    def _make_room(self) -> bool:
        """Drop the trace not used for longest, unless traces are made nearly as often as they are used."""
        if self.calls < USES_PER_TRACE * self.traces:
            return False
        self.entries.remove(min(self.entries, key=lambda entry: entry.last_call))
        return True

    def _give_up(self, shape: Any) -> Entry:
        file, line = where_defined(self.module)
        reason = f"is called in more than {ENTRY_LIMIT} ways (other inputs, modes or attributes)"
        entry = Entry(shape, Guards(), islands={self.path: Island(self.path, file, line, reason)})
        # as written from now on, whatever the call
        self.entries, self.gave_up = [entry], entry
        return entry

    def guess(self) -> Entry:
        """A trace made without an example call."""
        shape = guessed_shape(own_forward(unwrap(self.module))), ambient_modes()
        return self._trace(shape, lambda tracer: tracer.trace_guessed(self.path))

    def _trace(self, shape: Any, trace: Callable[[ModelTracer], bool]) -> Entry:
        tracer = ModelTracer(self.model)
        self.traces += 1
        entry = Entry(shape, tracer.guards, last_call=self.calls)
        if isinstance(self.module, LayerChoice | InputChoice):
            entry.notes[self.path] = "the model itself is a choice: there is no graph around it"
        elif trace(tracer):
            self._compile(entry, tracer)
        tracer.guards.complete(self.model)
        entry.islands.update(tracer.islands)
        entry.notes.update(tracer.notes)
        entry.has_scopes = tracer.has_scopes
        self.entries.append(entry)
        return entry

    def _compile(self, entry: Entry, tracer: ModelTracer) -> None:
        graph = tracer.graph
        gm = graph_module(self.model, graph, guards=tracer.guards, notes=entry.notes, tracer=tracer)
        islands = dict(tracer.islands)
        entry.rewrites = pipeline.run(gm, skip=self.skip)
        # looking into candidates leaves islands of its own behind; only those of the graph count
        tracer.islands = islands
        entry.function = as_function(gm.graph, self.path or type(self.module).__name__)
        entry.graph_module = gm
        targets = [node.target for node in gm.graph.nodes]
        entry.regions = tuple(target for target in targets if isinstance(target, Region))
        inside = [choice for region in entry.regions for choice in region.choices]
        entry.lowered = (*inside, *(target for target in targets if isinstance(target, LoweredChoice)))
        modules = {
            node.target: gm.get_submodule(str(node.target))
            for node in gm.graph.nodes
            if node.op == "call_module"
        }
        choices = [target.choice for target in entry.lowered]
        choices += [module for module in modules.values() if isinstance(module, LayerChoice | InputChoice)]
        # those of one key follow one decision
        entry.choices = tuple({(choice.key, choice.reduction): choice for choice in choices}.values())


def listens_to_scopes(mutator: BaseMutator | None) -> bool:
    """Whether the mutator wants to know when scopes are entered and left."""
    if mutator is None:
        return False
    own = type(mutator)
    return (
        own.enter_mutable_scope is not BaseMutator.enter_mutable_scope
        or own.exit_mutable_scope is not BaseMutator.exit_mutable_scope
    )


def scope_mutator(model: nn.Module) -> BaseMutator | None:
    """The mutator of the first scope of the model."""
    return next((m.bound_mutator for m in model.modules() if isinstance(m, MutableScope)), None)
