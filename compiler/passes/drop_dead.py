"""Removes every computation whose result no output depends on. For lean networks; a search keeps its side
effects."""

from __future__ import annotations

from torch import fx

from nascompile.compiler.inplace import base_of, changed_values


def drop_dead(gm: fx.GraphModule) -> int:
    """Erase all nodes that the output does not need, and those that change only values it does not need.

    Legal for a network that is trained afresh: what is removed has no influence on any output. In-place
    operations on a value that is needed, also through a view of it, are kept.
    """
    live = _live(gm)
    dead = [node for node in gm.graph.nodes if node not in live and node.op != "placeholder"]
    for node in reversed(dead):
        gm.graph.erase_node(node)
    return len(dead)


def _live(gm: fx.GraphModule) -> set[fx.Node]:
    live: set[fx.Node] = set()
    frontier = [node for node in gm.graph.nodes if node.op == "output"]
    changes = [(node, base_of(gm, value)) for node in gm.graph.nodes for value in changed_values(gm, node)]
    while frontier:
        node = frontier.pop()
        if node in live:
            continue
        live.add(node)
        frontier.extend(node.all_input_nodes)
        bases = {base_of(gm, member) for member in live}
        # buffers of the model are changed for the next call to see
        frontier.extend(
            n for n, base in changes if n not in live and (base in bases or base.op == "get_attr")
        )
    return live
