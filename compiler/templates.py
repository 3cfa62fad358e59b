"""The traced forward with every choice one node, fit to be computed for many architectures at once: nothing
in it changes a value in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nascompile.compiler.architecture import Mask
from nascompile.compiler.codegen import graph_module
from nascompile.compiler.inplace import is_in_place, is_view, mutated_value
from nascompile.compiler.mutables import InputChoice, LayerChoice, forced_mutator
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.passes.drop_identity import drop_identity
from nascompile.compiler.passes.functionalize_in_place import functionalize_in_place, may_return_argument
from nascompile.compiler.signature import guessed_inputs, inputs_like
from nascompile.compiler.trace import ModelTracer, is_builtin, own_forward, why_whole


class Apart(Exception):
    """Raised for an architecture that has to be run as written, on its own; the text says why."""


class Forced(Mutator):
    """Decides for one architecture without being bound."""

    def __init__(self, masks: Mapping[str, Mask]) -> None:
        nn.Module.__init__(self)
        self._cache, self._selections = {}, {}
        self.decide(dict(masks))


class Template:
    """The traced forward of the model, or of a candidate with choices of its own, for choices that give
    something except those in `nothing`. Raises Apart when there is no such graph."""

    def __init__(
        self, model: nn.Module, path: str, masks: Mapping[str, Mask], nothing: frozenset[str], example: Any
    ) -> None:
        tracer = _ChoiceTracer(model, nothing)
        forward = own_forward(model.get_submodule(path))

        def arguments(tracer: ModelTracer) -> Any:
            if example is None:
                return guessed_inputs(tracer, forward)
            return inputs_like(tracer, forward, *example)

        with forced_mutator(Forced(masks)):
            if not tracer.trace_module(path, arguments):
                raise Apart(str(tracer.islands[path]))
        self.is_inner = bool(path)
        self.gm = graph_module(model, tracer.graph, guards=tracer.guards, notes=tracer.notes, tracer=tracer)
        self.islands = {str(island) for island in tracer.islands.values()}
        drop_identity(self.gm)
        functionalize_in_place(self.gm)
        self.nodes = list(self.gm.graph.nodes)
        self.modules = {
            node: model.get_submodule(str(node.target)) for node in self.nodes if node.op == "call_module"
        }
        self._order = {node: position for position, node in enumerate(self.nodes)}
        self._families = _families(self.gm)
        self.copies = {node for node in self.nodes if self._make_functional(node)}

    def is_seen_later(self, node: fx.Node) -> bool:
        """Whether what `node` reads, or what may share memory with it, is read after `node`."""
        return self._is_given(node.all_input_nodes) or bool(self._seen_later(node, node.all_input_nodes))

    def _is_given(self, sources: list[fx.Node]) -> bool:
        # who called a part of the model may read the argument again
        family = {member for source in sources for member in self._families[source]}
        return self.is_inner and any(member.op == "placeholder" for member in family)

    def _seen_later(self, node: fx.Node, sources: list[fx.Node]) -> set[fx.Node]:
        here = self._order[node]
        family = {member for source in sources for member in self._families[source]}
        return {
            member
            for member in family
            if self._order[member] < here and any(self._order[user] > here for user in member.users)
        }

    def _make_functional(self, node: fx.Node) -> bool:
        """Whether `node` changes its argument in place; from then on its result stands for the argument."""
        if node.op == "call_module" and not is_builtin(self.modules[node]):
            return False  # found out when it runs
        if isinstance(node.kwargs.get("out"), fx.Node):
            raise Apart(f"{node.name} writes into an argument")
        if not is_in_place(self.gm, node):
            return False
        value = mutated_value(self.gm, node)
        family = self._families[value] if value is not None else set()
        if value is None or any(member.op == "get_attr" for member in family):
            raise Apart(f"{node.name} changes a tensor of the model in place")
        later = self._seen_later(node, [value])
        if later - {value} or self._is_given([value]):
            raise Apart(f"{node.name} changes a value that is seen under another name")
        here = self._order[node]
        value.replace_all_uses_with(node, delete_user_cb=lambda user: self._order[user] > here)
        return True


class _ChoiceTracer(ModelTracer):
    """Choices are nodes, except those that choose nothing; BatchNorm is a node whatever its class."""

    def __init__(self, model: nn.Module, nothing: frozenset[str]) -> None:
        super().__init__(model)
        self.nothing = nothing

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, LayerChoice | InputChoice):
            return m.key not in self.nothing or why_whole(m) is not None
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _families(gm: fx.GraphModule) -> dict[fx.Node, set[fx.Node]]:
    """For each node, those that may share its memory."""
    family: dict[fx.Node, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        family[node] = {node}
        if node.op != "output" and may_return_argument(gm, node):
            first = node.args[0] if node.args else None
            sources = node.all_input_nodes
            if isinstance(first, fx.Node) and (is_view(gm, node) or is_in_place(gm, node)):
                sources = [first]
            for source in sources:
                merged = family[node] | family[source]
                family.update(dict.fromkeys(merged, merged))
    return family
