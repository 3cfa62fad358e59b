"""Computes once what several candidates on the same source begin with: the ReLU, the padding, the pooling."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from nascompile.compiler.aliases import Aliases
from nascompile.compiler.candidates import Candidate, read_once
from nascompile.compiler.inplace import base_of
from nascompile.compiler.lower import LoweredLayerChoice, Shared, SharedCall


@dataclass(frozen=True, slots=True)
class _Consumer:
    node: fx.Node
    index: int
    path: str
    module: nn.Module
    candidate: Candidate


def share_prefixes(gm: fx.GraphModule) -> int:
    """Give candidates of all choices on one source a common, lazily computed prefix; the count is of prefixes
    saved.

    Legal because a prefix has no parameters, no state and no randomness, so equal prefixes of one value are
    equal; it is computed only if a chosen candidate needs it. Not done where anything may change the source
    in place: an operation, a module that was not looked into, a candidate.
    """
    aliases, changed = Aliases(gm), set[fx.Node]()
    for node in gm.graph.nodes:
        changed |= aliases.changed(node)
        changed.update(base_of(gm, value) for value in _changed_by_candidates(gm, node))
    saved = 0
    for source, nodes in _choices_by_source(gm).items():
        consumers, reason = _consumers(gm, nodes)
        if reason is None and base_of(gm, source) in changed:
            reason = f"{source.name} may be changed in place"
        if reason is not None:
            _note(gm, nodes, f"prefixes not shared: {reason}")
            continue
        saved += _share(gm, source, consumers)
    return saved


def _changed_by_candidates(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    if not isinstance(node.target, LoweredLayerChoice):
        return []
    return list(node.all_input_nodes) if _consumers(gm, [node])[1] is not None else []


def _choices_by_source(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    found: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        fresh = isinstance(node.target, LoweredLayerChoice) and not any(node.args[0])
        if fresh and len(node.args) == 2 and isinstance(node.args[1], fx.Node) and not node.kwargs:
            found[node.args[1]].append(node)
    return found


def _consumers(gm: fx.GraphModule, nodes: list[fx.Node]) -> tuple[list[_Consumer], str | None]:
    known: dict[Any, Candidate | str] = gm.meta.setdefault("candidates", {})
    found = []
    for node in nodes:
        choice: Any = node.target.choice  # type: ignore[union-attr]
        for index, (name, module) in enumerate(zip(choice.names, choice, strict=True)):
            if module is None:
                continue
            path = f"{node.target.path}.{name}" if node.target.path else name  # type: ignore[union-attr]
            candidate = read_once(module, known)
            if isinstance(candidate, str):
                return [], f"candidate {path!r} {candidate}"
            found.append(_Consumer(node, index, path, module, candidate))
    return found, None


def _share(gm: fx.GraphModule, source: fx.Node, consumers: list[_Consumer]) -> int:
    first = Counter(consumer.candidate.keys[0] for consumer in consumers if consumer.candidate.keys)
    made: dict[tuple[Any, ...], fx.Node] = {}
    saved = 0
    for consumer in consumers:
        keys = consumer.candidate.keys
        if not keys or first[keys[0]] < 2:
            continue
        value = source
        for depth, step in enumerate(consumer.candidate.prefix):
            chain = keys[: depth + 1]
            if chain not in made:
                with gm.graph.inserting_before(_first_user(gm, consumers)):
                    made[chain] = _shared_node(gm, step, consumer, value)
            else:
                saved += 1
            value = made[chain]
        target: LoweredLayerChoice = consumer.node.target  # type: ignore[assignment]
        assert consumer.candidate.body is not None
        target.bodies[consumer.index] = functools.partial(consumer.candidate.body, consumer.module)
        consumer.candidate.guard(consumer.module, gm.meta["guards"])
        shared = list(consumer.node.args[0])  # type: ignore[arg-type]
        shared[consumer.index] = value
        consumer.node.args = (tuple(shared), *consumer.node.args[1:])
    return saved


def _first_user(gm: fx.GraphModule, consumers: list[_Consumer]) -> fx.Node:
    nodes = {consumer.node for consumer in consumers}
    return next(node for node in gm.graph.nodes if node in nodes)


def _shared_node(gm: fx.GraphModule, step: fx.Node, consumer: _Consumer, value: fx.Node) -> fx.Node:
    if step.op == "call_function":
        target: Any = SharedCall(step.target)  # type: ignore[arg-type]
        return gm.graph.call_function(target, (value, *step.args[1:]), dict(step.kwargs))
    # "self": the candidate is that one module
    path = consumer.path if step.target == "self" else f"{consumer.path}.{step.target}"
    module = gm.get_submodule(path)
    gm.meta["guards"].traced(module)
    for name in config_names(module):
        gm.meta["guards"].saw(module, name, module.__dict__[name])
    return gm.graph.call_function(Shared, (gm.graph.get_attr(path), value), dict(step.kwargs))


def config_names(module: nn.Module) -> list[str]:
    """The attributes that make up a parameter-free torch.nn module."""
    internal = nn.Module().__dict__
    return [name for name in module.__dict__ if name not in internal]


def _note(gm: fx.GraphModule, nodes: list[fx.Node], reason: str) -> None:
    for node in nodes:
        gm.meta["notes"].setdefault(node.target.path, reason)  # type: ignore[union-attr]
