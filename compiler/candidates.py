"""Reads a candidate: the stateless steps it begins with, and the rest as a function of their result.

Candidates of equal structure (types, attributes, shapes) are read once: what was found is relative to the
candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nascompile.compiler.checks import has_hooks
from nascompile.compiler.codegen import as_function
from nascompile.compiler.fingerprint import attribute, fingerprint
from nascompile.compiler.guards import Guards
from nascompile.compiler.inplace import base_of, is_in_place, mutated_value
from nascompile.compiler.mutables import LayerChoice, Mutable
from nascompile.compiler.signature import required_parameters
from nascompile.compiler.space import unwrap
from nascompile.compiler.trace import ModelTracer, is_builtin, own_forward

_INTERNAL = frozenset(nn.Module().__dict__)
_STATELESS_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Softplus,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.ConstantPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
)
_STATELESS_FUNCTIONS = frozenset(
    (
        F.relu,
        F.relu6,
        F.leaky_relu,
        F.elu,
        F.gelu,
        F.silu,
        F.hardswish,
        F.sigmoid,
        F.tanh,
        F.pad,
        torch.relu,
        torch.sigmoid,
        torch.tanh,
        F.max_pool2d,
        F.avg_pool2d,
        F.adaptive_avg_pool2d,
    )
)


def called_module(candidate: nn.Module, call: fx.Node) -> nn.Module:
    """The module that a call in the graph of a candidate names; "self" is the candidate."""
    return candidate if call.target == "self" else candidate.get_submodule(str(call.target))


@dataclass(frozen=True, slots=True)
class Candidate:
    """`prefix`: the leading stateless nodes, their targets relative to the candidate; `keys`: equal for equal
    prefixes.

    `body(candidate, value)` computes the rest from the prefix's value. `read` and `looked_into` are the
    attributes and modules that the reading took for granted, by path inside the candidate. `graph` is the
    whole candidate; a built-in module is one call of "self".
    """

    prefix: tuple[fx.Node, ...]
    keys: tuple[Any, ...]
    body: Callable[[nn.Module, Any], Any] | None
    read: tuple[tuple[str, str], ...]
    looked_into: tuple[str, ...]
    returns_input: bool
    graph: fx.Graph

    def guard(self, candidate: nn.Module, guards: Guards) -> None:
        """Make what was taken for granted a condition of the trace that uses it."""
        for path, name in self.read:
            module = candidate.get_submodule(path)
            guards.saw(module, name, attribute(module, name))
        for path in ("", *self.looked_into):
            guards.traced(candidate.get_submodule(path))


def structure(module: nn.Module) -> Any:
    """Equal for modules that a trace cannot tell apart except by their weights."""
    if has_hooks(module) or "forward" in module.__dict__:
        return id(module)
    config = {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}
    tensors = [
        (name, t if t is None else t.shape)
        for name, t in (*module._parameters.items(), *module._buffers.items())
    ]
    children = [
        (name, child if child is None else structure(child)) for name, child in module._modules.items()
    ]
    return type(module), module.training, fingerprint(config), tuple(tensors), tuple(children)


def read_candidate(module: nn.Module) -> Candidate | str:
    """Read the candidate as a function of one value; a string says why its inside cannot be used."""
    if any(isinstance(child, Mutable) for child in module.modules()):
        return "contains choices of its own"
    if any(unwrap(child) is not child for child in module.modules()):
        return "contains a compiled model"
    tracer = ModelTracer(module)
    graph = _graph(tracer, module)
    if isinstance(graph, str):
        return graph
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    gm.__dict__.update({"_modules": {**module._modules, "self": module}, "_parameters": module._parameters})
    source = next(node for node in graph.nodes if node.op == "placeholder")
    changed = {base_of(gm, value) for node in graph.nodes if (value := mutated_value(gm, node)) is not None}
    if source in changed:
        return "changes its input in place"
    prefix: list[fx.Node] = []
    value = source
    while len(value.users) == 1:
        step = next(iter(value.users))
        if not _is_stateless(gm, step) or step in changed:
            break
        prefix.append(step)
        value = step
    keys = tuple(_key(gm, step) for step in prefix)
    body = _body(graph, tuple(prefix)) if prefix else None
    read, looked_into = tracer.guards.paths(tracer.paths)
    returned = {base_of(gm, node) for node in graph.nodes if any(user.op == "output" for user in node.users)}
    return Candidate(tuple(prefix), keys, body, read, looked_into, source in returned, graph)


def read_once(module: nn.Module, known: dict[Any, Candidate | str]) -> Candidate | str:
    """As `read_candidate`; candidates of equal structure are read once and kept in `known`."""
    key = structure(module)
    if key not in known:
        known[key] = read_candidate(module)
    return known[key]


def why_order_matters(choice: LayerChoice, known: dict[Any, Candidate | str]) -> str | None:
    """Why an output must be weighed before the next candidate runs: that may change it, or None.

    It happens where a candidate may hand on its input (as the identity does) and a later one may change it in
    place.
    """
    handed_on: str | None = None
    for name, module in zip(choice.names, choice, strict=True):
        if module is None:
            continue
        candidate = read_once(module, known)
        if isinstance(candidate, str) and handed_on is not None:
            changes = f"candidate {name!r} {candidate}, and may change its input"
            return f"{changes}, which candidate {handed_on!r} may return"
        if isinstance(candidate, str) or candidate.returns_input:
            handed_on = name
    return None


def _graph(tracer: ModelTracer, module: nn.Module) -> fx.Graph | str:
    if is_builtin(module):
        # one operation, called by the name under which `read_candidate` knows the candidate itself
        graph = fx.Graph()
        graph.output(graph.call_module("self", (graph.placeholder("x"),)))
        return graph
    required = required_parameters(own_forward(module))
    if len(required) != 1:
        return f"takes {len(required)} arguments"
    tracer.trace_guessed("")
    if tracer.islands or tracer.notes:
        return next((island.reason for island in tracer.islands.values()), None) or next(
            iter(tracer.notes.values())
        )
    return tracer.graph


def _is_stateless(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        plain = type(module) in _STATELESS_MODULES and not getattr(module, "return_indices", False)
        return plain and not has_hooks(module) and not is_in_place(gm, node) and len(node.args) == 1
    if node.op != "call_function" or node.target not in _STATELESS_FUNCTIONS or is_in_place(gm, node):
        return False
    return len(node.all_input_nodes) == 1 and node.args[:1] == (node.all_input_nodes[0],)


def _key(gm: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        config = {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}
        return type(module), fingerprint(config)
    return node.target, fingerprint(node.args[1:]), fingerprint(dict(node.kwargs))


def _body(graph: fx.Graph, prefix: tuple[fx.Node, ...]) -> Callable[[nn.Module, Any], Any]:
    rest = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {prefix[-1]: rest.placeholder("x")}
    for node in graph.nodes:
        if node.op != "placeholder" and node not in prefix:
            mapping[node] = rest.node_copy(node, lambda n: mapping[n])
    return as_function(rest, "candidate")
