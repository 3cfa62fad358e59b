"""Reads a candidate: the stateless steps it begins with, and the rest as a function of their result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nascompile.compiler.codegen import as_function
from nascompile.compiler.guards import fingerprint, has_hooks
from nascompile.compiler.inplace import is_in_place, is_view, mutated_value
from nascompile.compiler.mutables import Mutable
from nascompile.compiler.signature import required_parameters
from nascompile.compiler.trace import ModelTracer, is_builtin, own_forward

_STATELESS_MODULES = (
    (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh)
    + (nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus)
    + (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    + (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
    + (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)
)
_STATELESS_FUNCTIONS = frozenset(
    (F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.sigmoid, F.tanh, F.pad)
    + (torch.relu, torch.sigmoid, torch.tanh, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """`prefix`: the leading stateless nodes; `keys`: equal for equal prefixes; `body()`: the rest, as a function."""

    prefix: tuple[fx.Node, ...]
    keys: tuple[Any, ...]
    body: Callable[[], Callable[[Any], Any]]


def read_candidate(tracer: ModelTracer, path: str) -> Candidate | str:
    """Trace the candidate at `path` as a function of one value; a string says why its inside cannot be used."""
    module = tracer.root.get_submodule(path)
    if any(isinstance(child, Mutable) for child in module.modules()):
        return "contains choices of its own"
    graph = _trace(tracer, path, module)
    if isinstance(graph, str):
        return graph
    gm = _graph_module(tracer.root, graph)
    source = next(node for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        changed = mutated_value(gm, node)
        while changed is not None and is_view(gm, changed) and isinstance(changed.args[0], fx.Node):
            changed = changed.args[0]
        if changed is source:
            return "changes its input in place"
    prefix: list[fx.Node] = []
    while len(source.users) == 1:
        step = next(iter(source.users))
        if not _is_stateless(gm, step):
            break
        prefix.append(step)
        source = step
    # a value that is changed in place afterwards must not be shared
    while prefix and any(mutated_value(gm, user) is prefix[-1] for user in prefix[-1].users):
        prefix.pop()
    keys = tuple(_key(gm, step) for step in prefix)
    return Candidate(tuple(prefix), keys, functools.partial(_body, tracer.root, graph, tuple(prefix)))


def _trace(tracer: ModelTracer, path: str, module: nn.Module) -> fx.Graph | str:
    if is_builtin(module):
        graph = fx.Graph()
        value = graph.call_module(path, (graph.placeholder("x"),))
        graph.output(value)
        return graph
    required = required_parameters(own_forward(module))
    if len(required) != 1:
        return f"takes {len(required)} arguments"
    if not tracer.trace_guessed(path):
        return tracer.islands.pop(path).reason
    inner = next((p for p in tracer.islands if p == path or p.startswith(path + ".")), None)
    if inner is not None:
        return tracer.islands.pop(inner).reason
    return tracer.graph


def _graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    gm.__dict__["_modules"], gm.__dict__["_parameters"] = root._modules, root._parameters
    return gm


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
        internal = nn.Module().__dict__
        config = {name: value for name, value in module.__dict__.items() if name not in internal}
        return type(module), fingerprint(config)
    return node.target, fingerprint(node.args[1:]), fingerprint(dict(node.kwargs))


def _body(root: nn.Module, graph: fx.Graph, prefix: tuple[fx.Node, ...]) -> Callable[[Any], Any]:
    rest = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.users:
                mapping[node] = rest.placeholder("x")
        elif node is prefix[-1]:
            mapping[node] = next(iter(rest.nodes))
        elif node not in prefix:
            mapping[node] = rest.node_copy(node, lambda n: mapping[n])
    return functools.partial(as_function(rest, "candidate"), root)
