"""Removes calls of nn.Identity."""

from __future__ import annotations

from torch import fx, nn

from nascompile.compiler.checks import has_hooks
from nascompile.compiler.guards import Guards


def drop_identity(gm: fx.GraphModule) -> int:
    """Replace every call of nn.Identity by its argument.

    Legal because Identity returns the very object it is given; one with hooks is kept.
    """
    guards: Guards = gm.meta["guards"]
    dropped = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = gm.get_submodule(str(node.target))
        if type(module) is nn.Identity and not has_hooks(module):
            guards.traced(module)
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            dropped += 1
    return dropped
