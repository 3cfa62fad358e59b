"""Turns choice modules into callables that follow the decision without going through the mutator's
dispatch."""

from __future__ import annotations

from torch import fx

from nascompile.compiler.guards import Guards
from nascompile.compiler.lower import lowered, why_not_lowered
from nascompile.compiler.mutables import InputChoice, LayerChoice


def lower_choices(gm: fx.GraphModule) -> int:
    """Replace every call of a choice by a call of its lowered form.

    Legal because the lowered form asks the same mutator for the same decision, and hands the call over to a
    mutator that has its own way of carrying a choice out. What it takes for granted (names, reduction, no
    hooks) becomes a guard.
    """
    guards: Guards = gm.meta["guards"]
    rewritten = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        choice = gm.get_submodule(str(node.target))
        if not isinstance(choice, LayerChoice | InputChoice):
            continue
        reason = why_not_lowered(choice)
        if reason is not None:
            gm.meta["notes"][str(node.target)] = reason
            continue
        guards.traced(choice)
        for name in ("names", "choose_from", "reduction", "return_mask"):
            if hasattr(choice, name):
                guards.saw(choice, name, getattr(choice, name))
        shared = ((None,) * len(choice),) if isinstance(choice, LayerChoice) else ()
        node.op, node.target, node.args = (
            "call_function",
            lowered(choice, str(node.target)),
            (*shared, *node.args),
        )
        rewritten += 1
    return rewritten
