"""The choice graph: which choice feeds which, as a networkx graph with the measurements of every choice on
its nodes.

It is read off a run rather than off a traced graph, so that models which cannot be traced have one too.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nascompile.compiler.explore import map_tensors, tensors_in
from nascompile.compiler.mutables import InputChoice, MutableScope
from nascompile.compiler.profiler import ChoiceProfile, Profiler, path_of
from nascompile.compiler.space import Choice, StructuredMutableTreeNode, read_space

INPUT = "(input)"
OUTPUT = "(output)"
"""The nodes of the model's inputs and outputs; a path cannot contain parentheses of its own accord."""


def choice_graph(model: nn.Module, example_inputs: Any) -> nx.DiGraph:
    """The choice graph of `model`.

    Nodes are the choices by path, and INPUT and OUTPUT. A choice has the attributes `key`, `kind`
    ("LayerChoice" or "InputChoice"), `candidates` (a list of dicts with name, type, params, flops, output,
    error), `n_chosen`, `reduction`, `scopes` (keys of the enclosing MutableScopes, outermost first), `shared`
    (paths of the other choices with its key), `calls` (how often one pass calls it), `inside` (path of the
    enclosing choice and name of its candidate, or None), `order` (in which the first calls end; None when
    never called), `params` and `flops`.

    An edge says that values computed from the output of one choice, through any number of plain operations,
    reach another without passing a third. Into an InputChoice it has `candidates`, the indices of the inputs
    concerned. A nested choice feeds the choice around it. A choice called several times may feed itself, so
    the graph can have cycles. Values that leave tensors (`.item()`, numpy) are not followed.

    Raises NascompileError when the model does not run on the example inputs.
    """
    watcher = GraphWatcher(model)
    watcher.run(example_inputs)
    return watcher.graph()


class GraphWatcher(Profiler):
    """A profiler that also follows values from choice to choice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._sources = _Sources()
        self._edges: dict[tuple[str, str], set[int]] = {}
        self._all_edges: dict[tuple[str, str], set[int]] = {}
        self._order: dict[str, int] = {}

    def graph(self) -> nx.DiGraph:
        """The graph of what the runs showed; see `choice_graph`."""
        graph = nx.DiGraph()
        graph.add_node(INPUT, kind="input")
        scopes = _scopes(read_space(self.model))
        profiles = self.profiles()
        by_key: dict[str, list[str]] = defaultdict(list)
        for path, profile in profiles.items():
            by_key[profile.key].append(path)
        for path, profile in profiles.items():
            shared = [other for other in by_key[profile.key] if other != path]
            attributes = _attributes(profile, self.choices[path])
            graph.add_node(
                path, **attributes, scopes=scopes[path], shared=shared, order=self._order.get(path)
            )
        graph.add_node(OUTPUT, kind="output")
        for (source, target), candidates in self._all_edges.items():
            graph.add_edge(source, target, candidates=sorted(candidates))
        return graph

    def run_starts(self, args: tuple[Any, ...], decision: int) -> contextlib.AbstractContextManager[Any]:
        self._sources, self._edges = _Sources(), {}
        for tensor in tensors_in(args):
            self._sources.set(tensor, {INPUT})
        stack = contextlib.ExitStack()
        stack.enter_context(super().run_starts(args, decision))
        stack.enter_context(_Following(self._sources))
        return stack

    def call_starts(self, choice: Choice, call: int, inputs: Any) -> None:
        super().call_starts(choice, call, inputs)
        path = path_of(choice)
        if isinstance(choice, InputChoice):
            for index, value in enumerate(inputs):
                self._connect(value, path, index)
        else:
            self._connect(inputs, path, None)

    def candidate_ends(self, choice: Choice, call: int, index: int, output: Any, error: str | None) -> None:
        super().candidate_ends(choice, call, index, output, error)
        path = path_of(choice)
        for source in self._sources.of(output):
            inside = self._run.inside.get(source)
            if inside is not None and inside[0] == path:
                self._edges.setdefault((source, path), set())

    def call_ends(self, choice: Choice, call: int, output: Any) -> Any:
        self._order.setdefault(path_of(choice), len(self._order))

        def stamped(tensor: Tensor) -> Tensor:
            # memory of its own: an identity candidate returns its input, which others still read as such
            copy = tensor.clone()
            self._sources.set(copy, {path_of(choice)})
            return copy

        return map_tensors(super().call_ends(choice, call, output), stamped)

    def run_ends(self, output: Any, error: Exception | None) -> bool:
        if error is None:
            self._connect(output, OUTPUT, None)
            for edge, candidates in self._edges.items():
                self._all_edges.setdefault(edge, set()).update(candidates)
        return super().run_ends(output, error)

    def _connect(self, value: Any, target: str, candidate: int | None) -> None:
        for source in self._sources.of(value):
            candidates = self._edges.setdefault((source, target), set())
            if candidate is not None:
                candidates.add(candidate)


class _Sources:
    """From which choices the values in a piece of memory were computed. Views share memory, hence their
    sources."""

    def __init__(self) -> None:
        # a weak reference keeps the address from being given to another storage
        self._by_storage: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self._by_object: dict[int, tuple[Tensor, set[str]]] = {}

    def of(self, value: Any) -> set[str]:
        """The sources of all tensors in `value` together."""
        found: set[str] = set()
        for tensor in tensors_in(value):
            found |= self._entry(tensor)
        return found

    def set(self, tensor: Tensor, sources: set[str]) -> None:
        """Replace the sources of a tensor."""
        entry = self._entry(tensor)
        entry.clear()
        entry.update(sources)

    def add(self, tensor: Tensor, sources: set[str]) -> None:
        """Add to the sources of a tensor."""
        self._entry(tensor).update(sources)

    def _entry(self, tensor: Tensor) -> set[str]:
        if tensor.layout is not torch.strided:
            # sparse tensors have no storage of their own; they are rare, so they are kept alive
            return self._by_object.setdefault(id(tensor), (tensor, set()))[1]
        reference = StorageWeakRef(tensor.untyped_storage())
        return self._by_storage.setdefault(reference.cdata, (reference, set()))[1]


class _Following(TorchDispatchMode):
    """Hands the sources of the arguments of every operator on to its results and to what it writes to."""

    # what depends on the size of its argument only
    SIZE_ONLY = frozenset(
        getattr(torch.ops.aten, name)
        for name in (
            "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
            "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
        )
    )  # fmt: skip

    def __init__(self, sources: _Sources) -> None:
        super().__init__()
        self._sources = sources

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if getattr(func, "overloadpacket", None) in self.SIZE_ONLY:
            return output
        sources = self._sources.of((args, kwargs))
        if sources:
            written = [*_written(func, args, kwargs), *tensors_in(output)]
            for tensor in written:
                self._sources.add(tensor, sources)
        return output


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[position] if position < len(args) else kwargs.get(argument.name))
    return found


def _attributes(profile: ChoiceProfile, choice: Choice) -> dict[str, Any]:
    modules = [None] * len(choice) if isinstance(choice, InputChoice) else list(choice)
    candidates = [
        {
            "name": c.name,
            "type": None if module is None else type(module).__name__,
            "params": c.parameters,
            "flops": c.flops,
            "output": c.output,
            "error": c.error,
        }
        for c, module in zip(profile.candidates, modules, strict=True)
    ]
    return {
        "key": profile.key,
        "kind": profile.kind,
        "candidates": candidates,
        "n_chosen": profile.n_chosen,
        "reduction": profile.reduction,
        "calls": len(profile.calls),
        "inside": profile.inside,
        "params": profile.parameters,
        "flops": profile.flops,
    }


def _scopes(tree: StructuredMutableTreeNode) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def visit(node: StructuredMutableTreeNode, scopes: list[str]) -> None:
        if isinstance(node.mutable, MutableScope):
            scopes = [*scopes, node.mutable.key]
        elif node.mutable is not None:
            found[path_of(node.mutable)] = scopes
        for child in node.children:
            visit(child, scopes)

    visit(tree, [])
    return found
