"""Lowers connected parts of the graph to regions, each of which runs as one plan."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx, nn

from nascompile.compiler.aliases import Aliases
from nascompile.compiler.candidates import Candidate
from nascompile.compiler.codegen import as_function, graph_module
from nascompile.compiler.guards import Guards
from nascompile.compiler.inplace import base_of, changed_values
from nascompile.compiler.lower import LoweredChoice, LoweredLayerChoice
from nascompile.compiler.passes.fuse_weighted_sums import fuse_weighted_sums
from nascompile.compiler.passes.share_prefixes import share_prefixes
from nascompile.compiler.region.members import Members
from nascompile.compiler.region.region import Region
from nascompile.compiler.region.rewrites import REWRITES


def fuse_regions(gm: fx.GraphModule) -> int:
    """Replace connected parts of the graph that contain choices by calls of a Region; the count is of
    regions.

    Legal because a region computes the same function from the same tensors: a plan with the same gradients,
    buffers and decisions at run time, or where it cannot be made the very nodes it replaces. A part is
    convex: no path leaves it and comes back. What is read of modules becomes a guard. Not done around values
    that something else changes in place, and not for a choice whose output may be its input where a change
    of the one is seen in the other: a region computes a tensor of its own.
    """
    aliases = Aliases(gm)
    members, made = Members(gm, seen=aliases.seen), 0
    for nodes in _parts(gm, members, aliases):
        _guard(gm, _candidates(members, nodes))
        region = _replace(gm, members, nodes, f"region_{made}")
        gm.meta["guards"].also(region.settings)
        made += 1
    if made:
        _sort(gm.graph)
    return made


def fuse_others(gm: fx.GraphModule, outside: Collection[fx.Node], name: str) -> list[Region]:
    """As `fuse_regions` without nodes that turned out to be beyond plans, inside a region that has its guards
    already; the names of the regions begin with `name`."""
    members, made = Members(gm, outside), []
    for nodes in _parts(gm, members, Aliases(gm)):
        made.append(_replace(gm, members, nodes, f"{name}_{len(made)}"))
    if made:
        _sort(gm.graph)
    return made


def _parts(gm: fx.GraphModule, members: Members, aliases: Aliases) -> list[list[fx.Node]]:
    """The nodes of each region to be."""
    parts = _components(gm, members, _depths(gm, members))
    while members.leave_out_torn(parts):
        parts = _components(gm, members, _depths(gm, members))
    return [nodes for nodes in parts if _is_region(gm, nodes, aliases)]


def _is_region(gm: fx.GraphModule, nodes: Sequence[fx.Node], aliases: Aliases) -> bool:
    """Whether nodes become a region; if not, their choices are told why."""
    reason = _why_not(gm, nodes, aliases)
    for node in nodes if reason is not None else ():
        if isinstance(node.target, LoweredChoice):
            gm.meta.setdefault("outside", {})[node.target.path] = reason
    return reason is None


def _modules(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> dict[str, nn.Module]:
    return {
        str(node.target): gm.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"
    }


def _candidates(members: Members, nodes: Sequence[fx.Node]) -> dict[Any, list[tuple[nn.Module, Candidate]]]:
    targets = [node.target for node in nodes if isinstance(node.target, LoweredChoice)]
    return {target: members.candidates[target] for target in targets if target in members.candidates}


def _depths(gm: fx.GraphModule, members: Members) -> dict[fx.Node, int]:
    """How often the way to a node has to leave what regions hold; equal depths make convex parts."""
    depth: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        own = members.supported[node]
        depth[node] = max(
            (depth[x] + (members.supported[x] and not own) for x in node.all_input_nodes), default=0
        )
    return depth


def _components(gm: fx.GraphModule, members: Members, depth: dict[fx.Node, int]) -> list[list[fx.Node]]:
    group: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while group[node] is not node:
            group[node] = group[group[node]]
            node = group[node]
        return node

    nodes = [node for node in gm.graph.nodes if members.supported[node]]
    for node in nodes:
        group[node] = node
        for x in node.all_input_nodes:
            if members.supported[x] and depth[x] == depth[node]:
                group[find(x)] = find(node)
    parts: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        parts.setdefault(find(node), []).append(node)
    return list(parts.values())


def _why_not(gm: fx.GraphModule, nodes: Sequence[fx.Node], aliases: Aliases) -> str | None:
    if not any(isinstance(node.target, LoweredLayerChoice) for node in nodes):
        return "no choice of layers is connected to it"
    inside = set(nodes)
    border = {x for node in nodes for x in node.all_input_nodes} | inside
    bases = {base_of(gm, value) for value in border}
    for node in gm.graph.nodes:
        if node not in inside and aliases.changed(node) & bases:
            values = ", ".join(value.name for value in changed_values(gm, node))
            return f"{node.name} may change {values} in place"
    return None


def _replace(gm: fx.GraphModule, members: Members, nodes: list[fx.Node], name: str) -> Region:
    inside = set(nodes)
    inputs = list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    # the region keeps a graph of its own; the nodes leave this one
    copied, mapping = _copy(nodes, inputs, outputs)
    region = Region(
        name,
        _modules(gm, nodes),
        [mapping[node] for node in nodes],
        [mapping[node] for node in inputs],
        [mapping[node] for node in outputs],
        _candidates(members, nodes),
        _Rest(gm, copied, name),
        gm.meta["notes"],
        frozenset(gm.meta.get("skip", ())) & frozenset(REWRITES),
    )
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.call_function(region, tuple(inputs))
    results = [call] if outputs else []
    if len(outputs) > 1:
        with gm.graph.inserting_after(call):
            results = [gm.graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
    for node, result in zip(outputs, results, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    return region


def _copy(
    nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    mapping = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        mapping[node] = graph.node_copy(node, lambda x: mapping[x])
    found = tuple(mapping[node] for node in outputs)
    graph.output(found[0] if len(found) == 1 else found)
    return graph, mapping


class _Rest:
    """What a region does without a plan of its own: its nodes op by op, or in parts that have plans.

    Functions are made when they are first needed.
    """

    def __init__(self, gm: fx.GraphModule, graph: fx.Graph, name: str) -> None:
        self._root, self._graph, self._name = gm, graph, name
        self._function: Callable[..., Any] | None = None

    def __call__(self, *tensors: Any) -> Any:
        if self._function is None:
            # the region reads its nodes whenever it makes a plan: the passes get a copy
            self._function = _as_function(self._copy()[0])
        return self._function(self._root, *tensors)

    def in_parts(self, outside: Collection[fx.Node]) -> tuple[Callable[..., Any], list[Region]]:
        """The same with regions for all but some nodes, and these regions."""
        gm, mapping = self._copy()
        regions = fuse_others(gm, {mapping[node] for node in outside}, self._name)
        return functools.partial(_as_function(gm), self._root), regions

    def _copy(self) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
        graph, mapping = fx.Graph(), {}
        output = graph.graph_copy(self._graph, mapping)
        graph.output(output)
        return graph_module(self._root, graph, **self._root.meta), mapping


def _as_function(gm: fx.GraphModule) -> Callable[..., Any]:
    # notes are for the model as it is compiled, not for what stands in for a plan
    gm.meta["notes"] = {}
    share_prefixes(gm)
    fuse_weighted_sums(gm)
    return as_function(gm.graph, "region")


def _guard(gm: fx.GraphModule, candidates: dict[Any, list[tuple[nn.Module, Candidate]]]) -> None:
    guards: Guards = gm.meta["guards"]
    for module, candidate in (pair for found in candidates.values() for pair in found):
        candidate.guard(module, guards)


def _sort(graph: fx.Graph) -> None:
    """Bring the nodes into an order in which each follows what it takes; the old order where that is free."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    placed: set[fx.Node] = set()
    anchor = graph._root

    def place(node: fx.Node) -> None:
        nonlocal anchor
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [x for x in top.all_input_nodes if x not in placed]
            if top in placed:
                stack.pop()
            elif missing:
                stack.extend(sorted(missing, key=order.__getitem__, reverse=True))
            else:
                placed.add(top)
                anchor.append(top)
                anchor = top
                stack.pop()

    for node in list(graph.nodes):
        place(node)
