"""What a legal graph is at each stage, checked at the borders between passes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from nascompile.compiler.inplace import mutated_value
from nascompile.compiler.lower import (
    LoweredChoice,
    LoweredInputChoice,
    LoweredLayerChoice,
    is_shared,
    why_not_lowered,
)
from nascompile.compiler.mutables import InputChoice, LayerChoice

Rule = Callable[[fx.GraphModule, fx.Node], str | None]


def _targets_exist(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_module":
        try:
            gm.get_submodule(str(node.target))
        except AttributeError:
            return f"calls {node.target!r}, which the model does not have"
    return None


def _ends_in_output(gm: fx.GraphModule, node: fx.Node) -> str | None:
    last = next(iter(reversed(gm.graph.nodes)))
    return "the graph does not end in an output" if last.op != "output" else None


def _choices_are_lowered(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    if isinstance(module, LayerChoice | InputChoice) and why_not_lowered(module) is None:
        return f"choice {node.target!r} has not been lowered"
    return None


def _lowered_calls(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if not isinstance(node.target, LoweredChoice):
        return None
    if isinstance(node.target, LoweredInputChoice):
        return None if len(node.args) == 1 else "an input choice takes one list or dict"
    shared = node.args[0] if node.args else None
    if not isinstance(shared, list | tuple) or len(shared) != len(node.target.choice):
        return "a layer choice takes one shared prefix, or None, for every candidate first"
    for index, prefix in enumerate(shared):
        if prefix is None:
            continue
        if not isinstance(prefix, fx.Node) or not is_shared(prefix):
            return f"prefix {index} is not a shared value"
        assert isinstance(node.target, LoweredLayerChoice)
        if node.target.bodies[index] is None:
            return f"candidate {index} has a shared prefix but no body"
    return None


def _shared_sources_stay(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if not is_shared(node):
        return None
    for user in (user for source in node.all_input_nodes for user in source.users):
        if mutated_value(gm, user) in node.all_input_nodes:
            return f"{user.name} changes the source of a shared value in place"
    return None


TRACED: tuple[Rule, ...] = (_targets_exist, _ends_in_output)
LOWERED: tuple[Rule, ...] = (*TRACED, _choices_are_lowered, _lowered_calls, _shared_sources_stay)
STAGES = {"traced": TRACED, "lowered": LOWERED}


def check(gm: fx.GraphModule, stage: str, after: str) -> None:
    """Assert that `gm` is legal at `stage` ("traced" or "lowered"); `after` names what produced it."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        for rule in STAGES[stage]:
            problem = rule(gm, node)
            assert problem is None, f"illegal after {after}: {node.format_node()}: {problem}"
