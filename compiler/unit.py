"""One module of the model that is compiled on its own: the model itself, and what islands call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from nascompile.compiler import pipeline
from nascompile.compiler.codegen import as_function, graph_module
from nascompile.compiler.guards import Guards
from nascompile.compiler.lower import LoweredChoice
from nascompile.compiler.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.compiler.mutator import BaseMutator
from nascompile.compiler.signature import call_shape, guessed_shape, inputs_like
from nascompile.compiler.trace import Island, ModelTracer, ambient_modes, own_forward

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
    islands: dict[str, Island] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    rewrites: dict[str, int] = field(default_factory=dict)
    has_scopes: bool = False
    calls_back: bool | None = None

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

    def entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The trace for a call; made when there is none yet."""
        shape = call_shape(args, kwargs), ambient_modes()
        for entry in self.entries:
            if entry.suits(shape):
                return entry
        if len(self.entries) >= ENTRY_LIMIT:
            reason = f"is called in more than {ENTRY_LIMIT} ways (other inputs, modes or attributes)"
            island = Island(self.path, "", 0, reason)
            return Entry(shape, Guards(), islands={self.path: island})
        forward = own_forward(self.module)
        return self._trace(
            shape, lambda t: t.trace_module(self.path, lambda u: inputs_like(u, forward, args, kwargs))
        )

    def guess(self) -> Entry:
        """A trace made without an example call."""
        shape = guessed_shape(own_forward(self.module)), ambient_modes()
        return self._trace(shape, lambda tracer: tracer.trace_guessed(self.path))

    def _trace(self, shape: Any, trace: Callable[[ModelTracer], bool]) -> Entry:
        tracer = ModelTracer(self.model)
        entry = Entry(shape, tracer.guards)
        if isinstance(self.module, LayerChoice | InputChoice):
            entry.notes[self.path] = "the model itself is a choice: there is no graph around it"
        elif trace(tracer):
            self._compile(entry, tracer)
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
        entry.lowered = tuple(target for target in targets if isinstance(target, LoweredChoice))


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
