"""Lowers connected parts of the graph to regions, each of which runs as one plan."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nascompile.compiler.candidates import Candidate, read_once
from nascompile.compiler.codegen import as_function, graph_module
from nascompile.compiler.groups import find_groups
from nascompile.compiler.guards import HOOKS, Guards
from nascompile.compiler.inplace import base_of, changed_values, is_in_place
from nascompile.compiler.lower import LoweredChoice, LoweredInputChoice, LoweredLayerChoice
from nascompile.compiler.passes.fuse_weighted_sums import fuse_weighted_sums
from nascompile.compiler.passes.share_prefixes import share_prefixes
from nascompile.compiler.region.ir import Unsupported
from nascompile.compiler.region.operations import CONFIGURATION, kind_of
from nascompile.compiler.region.region import Region
from nascompile.compiler.region.rewrites import REWRITES

_FUNCTIONS = frozenset(
    (F.relu, F.relu6, torch.relu, torch.cat, operator.add, torch.add, operator.getitem, torch.zeros_like)
)
_METHODS = frozenset(("relu", "add"))
_RANDOM = "dropout is random"
_WORKERS = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)


def fuse_regions(gm: fx.GraphModule) -> int:
    """Replace connected parts of the graph that contain choices by calls of a Region; the count is of
    regions.

    Legal because a region computes the same function from the same tensors: a plan with the same gradients,
    buffers and decisions at run time, or where it cannot be made the very nodes it replaces. A part is
    convex: no path leaves it and comes back. What is read of modules becomes a guard. Not done around values
    that something else changes in place.
    """
    reader = _Reader(gm)
    depth = _depths(gm, reader)
    parts = _components(gm, reader, depth)
    made = 0
    for nodes in parts:
        reason = _why_not(gm, nodes)
        if reason is None:
            _replace(gm, reader, nodes, made)
            made += 1
    if made:
        _sort(gm.graph)
    return made


class _Reader:
    """Says which nodes a region may hold, and keeps the candidates it read on the way."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.known: dict[Any, Candidate | str] = gm.meta.setdefault("candidates", {})
        self.candidates: dict[LoweredChoice, list[tuple[nn.Module, Candidate]]] = {}
        self.supported: dict[fx.Node, bool] = {}
        self._reasons: dict[int, str | None] = {}
        for node in gm.graph.nodes:
            reason = self._why_not(node)
            self.supported[node] = reason is None
            if reason and isinstance(node.target, LoweredChoice):
                gm.meta.setdefault("outside", {})[node.target.path] = reason
            if reason and _RANDOM in reason:
                self._expect_training(node)

    def _expect_training(self, node: fx.Node) -> None:
        """In evaluation there is another trace, with the dropout inside of regions."""
        layer: Any = node.target.choice if isinstance(node.target, LoweredChoice) else None
        guards: Guards = self.gm.meta["guards"]
        for module in (self.gm.get_submodule(str(node.target)) if layer is None else layer).modules():
            if isinstance(module, nn.Dropout):
                guards.saw(module, "training", module.training)

    def _why_not(self, node: fx.Node) -> str | None:
        if isinstance(node.target, LoweredLayerChoice):
            return self._why_not_layer_choice(node)
        if isinstance(node.target, LoweredInputChoice):
            return self._why_not_input_choice(node)
        if node.op in ("placeholder", "output", "get_attr"):
            return "is an input, output or attribute"
        return why_not_operation(self.gm, node)

    def _why_not_layer_choice(self, node: fx.Node) -> str | None:
        target: Any = node.target
        choice = target.choice
        if len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], fx.Node):
            return "takes more than one image"
        reason = _why_not_choice(choice)
        if reason is not None:
            return reason
        found = []
        for name, module in zip(choice.names, choice, strict=True):
            if module is None:
                return f"candidate {name!r} is None"
            candidate = read_once(module, self.known)
            if isinstance(candidate, str):
                return f"candidate {name!r} {candidate}"
            reason = self._why_not_candidate(module, candidate)
            if reason is not None:
                return f"candidate {name!r}: {reason}"
            found.append((module, candidate))
        if self._is_merged(choice, [candidate for _, candidate in found]):
            return "its candidates are merged into one convolution"
        self.candidates[target] = found
        return None

    def _is_merged(self, choice: Any, candidates: Sequence[Candidate]) -> bool:
        """Whether convolutions of the choice become a single one, which is better than any plan."""
        pairs = zip(candidates, choice, strict=True)
        if sum(_is_affine(candidate, module) for candidate, module in pairs) < 2:
            return False
        prefixes = [None] * len(choice)
        groups, _ = find_groups(choice, prefixes, self.gm.meta["guards"], self.known)
        return any(group.pattern.name == "merge" for group in groups)

    def _why_not_candidate(self, module: nn.Module, candidate: Candidate) -> str | None:
        # candidates of equal structure are one object
        if id(candidate) not in self._reasons:
            inside: Any = _Inside(module)
            steps = [step for step in candidate.graph.nodes if step.op not in ("placeholder", "output")]
            reasons = (why_not_operation(inside, step) for step in steps)
            self._reasons[id(candidate)] = next((reason for reason in reasons if reason), None)
        return self._reasons[id(candidate)]

    def _why_not_input_choice(self, node: fx.Node) -> str | None:
        reason = _why_not_choice(node.target.choice)  # type: ignore[union-attr]
        if reason is not None:
            return reason
        parts = node.args[0] if len(node.args) == 1 else None
        if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
            return "takes something else than a list of images"
        return None


def _is_affine(candidate: Candidate, module: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Identity)
    inside = _Inside(module)
    steps = [step for step in candidate.graph.nodes if step.op not in ("placeholder", "output")]
    return bool(steps) and all(
        step.op == "call_module" and isinstance(inside.get_submodule(str(step.target)), kinds)
        for step in steps
    )


def _why_not_choice(choice: Any) -> str | None:
    if choice.return_mask:
        return "returns its mask"
    return None if choice.reduction in ("sum", "mean") else f'reduction "{choice.reduction}" is not a sum'


class _Inside:
    """The modules inside a candidate, by the names that its graph has for them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get_submodule(self, path: str) -> nn.Module:
        return self._module if path == "self" else self._module.get_submodule(path)


def why_not_operation(gm: Any, node: fx.Node) -> str | None:
    """Why a module, function or method cannot be part of a region, or None."""
    if is_in_place(gm, node):
        changed = node.args[0] if node.args else None
        own = isinstance(changed, fx.Node) and changed.op != "placeholder" and len(changed.users) == 1
        if not own:
            return f"{node.name} changes a value in place that others see"
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        try:
            kind = kind_of(module)
        except Unsupported as reason:
            return str(reason)
        # left to itself, in its place among all that draws random numbers
        return _RANDOM if kind is nn.Dropout and module.training and module.p > 0 else None
    if node.op == "call_function" and node.target is operator.getitem:
        return _why_not_crop(node)
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return None
    if node.op == "call_method" and node.target in _METHODS:
        return None
    return f"{node.name} ({node.target}) is not understood by regions"


def _why_not_crop(node: fx.Node) -> str | None:
    index = node.args[1]
    if isinstance(index, tuple) and index and index[0] == slice(None, None, None):
        return None
    if all(user.target is torch.zeros_like for user in node.users):
        return None
    return f"{node.name} takes some samples only"


def _depths(gm: fx.GraphModule, reader: _Reader) -> dict[fx.Node, int]:
    """How often the way to a node has to leave what regions hold; equal depths make convex parts."""
    depth: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        own = reader.supported[node]
        depth[node] = max(
            (depth[x] + (reader.supported[x] and not own) for x in node.all_input_nodes), default=0
        )
    return depth


def _components(gm: fx.GraphModule, reader: _Reader, depth: dict[fx.Node, int]) -> list[list[fx.Node]]:
    group: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while group[node] is not node:
            group[node] = group[group[node]]
            node = group[node]
        return node

    nodes = [node for node in gm.graph.nodes if reader.supported[node]]
    for node in nodes:
        group[node] = node
        for x in node.all_input_nodes:
            if reader.supported[x] and depth[x] == depth[node]:
                group[find(x)] = find(node)
    parts: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        parts.setdefault(find(node), []).append(node)
    return list(parts.values())


def _why_not(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> str | None:
    if not any(isinstance(node.target, LoweredLayerChoice) for node in nodes):
        return "holds no choice of layers"
    inside = set(nodes)
    border = {x for node in nodes for x in node.all_input_nodes} | inside
    bases = {base_of(gm, value) for value in border}
    for node in gm.graph.nodes:
        if node not in inside:
            for value in changed_values(gm, node):
                if base_of(gm, value) in bases:
                    return f"{node.name} may change {value.name} in place"
    return None


def _replace(gm: fx.GraphModule, reader: _Reader, nodes: list[fx.Node], number: int) -> None:
    inside = set(nodes)
    inputs = list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    modules = {
        str(node.target): gm.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"
    }
    targets = [node.target for node in nodes if isinstance(node.target, LoweredChoice)]
    candidates = {target: reader.candidates[target] for target in targets if target in reader.candidates}
    _guard(gm, modules, candidates)
    # the region keeps a graph of its own; the nodes leave this one
    copied, mapping = _copy(nodes, inputs, outputs)
    region = Region(
        f"region_{number}",
        modules,
        [mapping[node] for node in nodes],
        [mapping[node] for node in inputs],
        [mapping[node] for node in outputs],
        candidates,
        _Fallback(gm, copied),
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


class _Fallback:
    """The nodes of a region as a function, prepared when it is first needed."""

    def __init__(self, gm: fx.GraphModule, graph: fx.Graph) -> None:
        self._root, self._graph = gm, graph
        self._function: Callable[..., Any] | None = None

    def __call__(self, *tensors: Any) -> Any:
        if self._function is None:
            self._function = self._prepare()
        return self._function(self._root, *tensors)

    def _prepare(self) -> Callable[..., Any]:
        # the region reads its nodes whenever it makes a plan: the passes get a copy
        graph = fx.Graph()
        output = graph.graph_copy(self._graph, {})
        graph.output(output)
        gm = graph_module(self._root, graph, **self._root.meta)
        share_prefixes(gm)
        fuse_weighted_sums(gm)
        return as_function(gm.graph, "region")


def _guard(
    gm: fx.GraphModule,
    modules: dict[str, nn.Module],
    candidates: dict[Any, list[tuple[nn.Module, Candidate]]],
) -> None:
    guards: Guards = gm.meta["guards"]
    places = gm.meta["tracer"].places
    leaves: dict[nn.Module, None] = dict.fromkeys(modules.values())
    for module in modules.values():
        if module in places:
            guards.placed(module, places[module])
    for target, found in candidates.items():
        for name, (module, candidate) in zip(target.choice.names, found, strict=True):
            candidate.guard(module, guards, (target.choice._modules, name))
            for node in candidate.graph.nodes:
                if node.op == "call_module":
                    path = "" if node.target == "self" else str(node.target)
                    leaf = module.get_submodule(path)
                    leaves[leaf] = None
                    if path and leaf in places:
                        guards.placed(leaf, places[leaf])
    guards.also(functools.partial(_all_hold, [_Expected(leaf) for leaf in leaves]))


class _Expected:
    """The attributes of a module that its meaning depends on, and how they were."""

    __slots__ = ("_attributes", "_get", "_parameters", "_present", "_values")

    def __init__(self, module: nn.Module) -> None:
        names = [name for name in CONFIGURATION[kind_of(module)] if name in module.__dict__]
        self._attributes = module.__dict__
        self._get = operator.itemgetter(*names, *HOOKS)
        self._values = tuple(
            dict(value) if isinstance(value, dict) else value for value in self._get(module.__dict__)
        )
        self._parameters = module._parameters
        self._present = [value is None for value in module._parameters.values()]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if "forward" in self._attributes or self._get(self._attributes) != self._values:
            return False
        return [value is None for value in self._parameters.values()] == self._present


def _all_hold(expected: Sequence[_Expected]) -> bool:
    return all(one.holds() for one in expected)


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
