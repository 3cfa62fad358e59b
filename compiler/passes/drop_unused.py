"""Removes what nothing uses."""

from __future__ import annotations

import operator

from torch import fx

_PURE_FUNCTIONS = frozenset({getattr, operator.getitem})
_PURE_METHODS = frozenset({"size", "dim", "numel", "stride", "item", "is_contiguous"})


def drop_unused(gm: fx.GraphModule) -> int:
    """Erase attribute reads, item reads and shape questions without users, last first.

    Legal because these compute nothing and change nothing. Everything else stays even when its result is
    unused: in the user's program it moves running statistics and the random state.
    """
    dropped = 0
    for node in reversed(list(gm.graph.nodes)):
        pure = (
            node.op == "get_attr"
            or (node.op == "call_function" and node.target in _PURE_FUNCTIONS)
            or (node.op == "call_method" and node.target in _PURE_METHODS)
        )
        if pure and not node.users:
            gm.graph.erase_node(node)
            dropped += 1
    return dropped
