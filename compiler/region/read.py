"""Reads the part of an fx graph that a region covers as a graph of image operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from nascompile.compiler.candidates import Candidate, called_module
from nascompile.compiler.lower import LoweredChoice, LoweredInputChoice, LoweredLayerChoice
from nascompile.compiler.region.executors import Executor
from nascompile.compiler.region.functions import Env, apply_function
from nascompile.compiler.region.ir import Graph, Shape, Sum, TermInfo, Unsupported, Value, Weight, Zero
from nascompile.compiler.region.operations import apply_module


def read(
    modules: Mapping[str, nn.Module],
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    candidates: Mapping[LoweredChoice, Sequence[tuple[nn.Module, Candidate]]],
    shapes: Sequence[Shape],
    is_weighted: Mapping[LoweredChoice, bool],
    executor: Executor,
    without: frozenset[str] = frozenset(),
) -> Graph:
    """The graph of `nodes` for inputs of the given shapes (channels, height, width).

    `is_weighted`: for every choice, whether its decision has weights or only selects. Raises Unsupported.
    """
    shares = "share_values" not in without
    graph = Graph(shapes, executor.dtype, executor.device, lane=executor.lane(), shares=shares)
    env: Env = dict(zip(inputs, graph.sources, strict=True))
    for node in nodes:
        with _at(node):
            if isinstance(node.target, LoweredLayerChoice):
                env[node] = _layer_choice(graph, node, env, candidates[node.target], is_weighted[node.target])
            elif isinstance(node.target, LoweredInputChoice):
                env[node] = _input_choice(graph, node, env, is_weighted[node.target])
            else:
                env[node] = _apply(graph, modules, node, env, None)
    for node in outputs:
        with _at(node):
            if isinstance(env[node].op, Zero):
                raise Unsupported("an output is zero")
    graph.outputs = [env[node] for node in outputs]
    return graph


@contextmanager
def _at(node: fx.Node) -> Iterator[None]:
    """Where something that is not understood was found."""
    try:
        yield
    except Unsupported as reason:
        reason.node = node
        raise


def _apply(
    graph: Graph, modules: Mapping[str, nn.Module], node: fx.Node, env: Env, owner: Weight | None
) -> Value:
    if node.op != "call_module":
        return apply_function(graph, node, env, owner)
    arg = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(arg, fx.Node) or arg not in env:
        raise Unsupported(f"{node.format_node()} does not take one image of the region")
    return apply_module(graph, modules[str(node.target)], env[arg], owner)


def _layer_choice(
    graph: Graph,
    node: fx.Node,
    env: Env,
    candidates: Sequence[tuple[nn.Module, Candidate]],
    is_weighted: bool,
) -> Value:
    target: Any = node.target
    source = env[node.args[1]]  # type: ignore[index]
    weights = [Weight(target.choice.key, index) for index in range(len(candidates))]
    outputs = [
        _candidate(graph, module, candidate, source, weight)
        for (module, candidate), weight in zip(candidates, weights, strict=True)
    ]
    return _weigh(graph, target.choice, outputs, weights, is_weighted)


def _candidate(graph: Graph, module: nn.Module, candidate: Candidate, source: Value, owner: Weight) -> Value:
    env: Env = {}
    modules = {
        str(node.target): called_module(module, node)
        for node in candidate.graph.nodes
        if node.op == "call_module"
    }
    for node in candidate.graph.nodes:
        if node.op == "placeholder":
            if not env:
                env[node] = source
        elif node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node) or result not in env:
                raise Unsupported(f"candidate {type(module).__name__} does not return an image")
            return env[result]
        else:
            env[node] = _apply(graph, modules, node, env, owner)
    raise AssertionError("a graph without an output")


def _input_choice(graph: Graph, node: fx.Node, env: Env, is_weighted: bool) -> Value:
    choice: Any = node.target.choice  # type: ignore[union-attr]
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    weights = [Weight(choice.key, index) for index in range(len(parts))]
    return _weigh(graph, choice, [env[part] for part in parts], weights, is_weighted)  # type: ignore[index]


def _weigh(
    graph: Graph, choice: Any, outputs: list[Value], weights: list[Weight], is_weighted: bool
) -> Value:
    shapes = {value.shape for value in outputs}
    if len(shapes) > 1:
        raise Unsupported(f"the candidates of {choice.key!r} return images of {sorted(shapes)}")
    # the mean over the chosen is a sum with weights
    is_mean = choice.reduction == "mean"
    scales = [Weight(weight.key, weight.index, is_mean) for weight in weights]
    pairs = zip(scales if is_weighted or is_mean else [None] * len(weights), weights, strict=True)
    infos = tuple(TermInfo(scale, (weight,)) for scale, weight in pairs)
    return graph.add(Sum(infos), outputs, outputs[0].shape, None)
