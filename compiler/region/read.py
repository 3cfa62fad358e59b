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
from nascompile.compiler.region.vectors import (
    Seen,
    apply_resize,
    asked_size,
    asks_for_sizes,
    is_expansion,
    resize_of,
    seen,
)


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
            if not isinstance(env[node], Value):
                raise Unsupported(f"{node.name} is no image")
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
) -> Any:
    """An image, or on the way from one to the next what vectors.py has."""
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    given = None if first is None else env.get(first)
    module = modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(given, tuple):
        return given[node.args[1]]  # type: ignore[index]
    if given is not None and asks_for_sizes(node):
        return asked_size(given, *(node.args[1:] if node.op == "call_method" else ()))
    if isinstance(given, Value) and is_expansion(node):
        return given
    resize = resize_of(node, module, of_image=isinstance(given, Value))
    if isinstance(given, Value | Seen) and resize is not None:
        name, args, kwargs = fx.node.map_arg(resize, lambda x: _known(node, x, env))  # type: ignore[misc]
        return apply_resize(graph, given, module, (name, args, kwargs), owner)
    if isinstance(given, Seen):
        assert first is not None
        inner = {**env, first: given.image}
        return seen(_image(graph, module, node, inner, owner), given.sizes)
    return _image(graph, module, node, env, owner)


def _known(node: fx.Node, argument: fx.Node, env: Env) -> Any:
    if argument not in env:
        raise Unsupported(f"{node.format_node()} takes something from outside of the region")
    return env[argument]


def _image(graph: Graph, module: nn.Module | None, node: fx.Node, env: Env, owner: Weight | None) -> Value:
    if module is None:
        return apply_function(graph, node, env, owner)
    arg = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(arg, fx.Node) or not isinstance(env.get(arg), Value):
        raise Unsupported(f"{node.format_node()} does not take one image of the region")
    return apply_module(graph, module, env[arg], owner)


def _layer_choice(
    graph: Graph,
    node: fx.Node,
    env: Env,
    candidates: Sequence[tuple[nn.Module, Candidate]],
    is_weighted: bool,
) -> Value:
    target: Any = node.target
    source = env[node.args[1]]  # type: ignore[index]
    if not isinstance(source, Value):
        raise Unsupported(f"{target.choice.key!r} does not take an image of the region")
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
            if not isinstance(result, fx.Node) or not isinstance(env.get(result), Value):
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
    outputs = [env[part] for part in parts]  # type: ignore[index]
    if not all(isinstance(output, Value) for output in outputs):
        raise Unsupported(f"{choice.key!r} does not choose among images of the region")
    return _weigh(graph, choice, outputs, weights, is_weighted)


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
