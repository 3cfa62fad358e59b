"""Replaces `x += y` and `x.add_(y)` by `x = x + y` where nothing could tell the difference, so that autograd
accepts it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from nascompile.compiler.inplace import is_in_place, is_view
from nascompile.compiler.lower import LoweredChoice

_OUT_OF_PLACE: dict[Any, str] = {
    **{getattr(operator, f"i{name}"): name for name in ("add", "sub", "mul", "truediv", "pow")},
    **{"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "truediv"},
}
"""Functions and methods, and the operators that compute the same."""


def out_of_place(operation: str, value: Any, other: Any) -> Any:
    """`operator.<operation>(value, other)` in the type of `value`, as the in-place form keeps it."""
    result = getattr(operator, operation)(value, other)
    return (
        result.to(value.dtype)
        if isinstance(result, torch.Tensor) and isinstance(value, torch.Tensor)
        else result
    )


def functionalize_in_place(gm: fx.GraphModule) -> int:
    """Make in-place arithmetic functional when the old value, and all that may share its memory, is not used
    later.

    Legal because then the old value cannot be seen again: who reads the changed value reads the result.
    Inputs, parameters and buffers are visible outside and stay in place. It repairs programs such as
    `x = relu(choice(x)); x += skip`, which eager autograd refuses.
    """
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    rewritten = 0
    for node in list(gm.graph.nodes):
        if not _is_arithmetic(node):
            continue
        value: Any = node.args[0]
        family = _may_share_memory(gm, value, order, order[node])
        if any(member.op in ("placeholder", "get_attr") for member in family):
            continue
        others = family - {value}
        if any(order[user] > order[node] for member in others for user in member.users):
            continue
        for user in list(value.users):
            if order[user] > order[node]:
                user.replace_input_with(value, node)
        node.op, node.args = "call_function", (_OUT_OF_PLACE[node.target], *node.args)
        node.target = out_of_place
        rewritten += 1
    return rewritten


def _is_arithmetic(node: fx.Node) -> bool:
    """Whether the node changes a value in place in a way that an operator computes."""
    if node.op not in ("call_function", "call_method") or node.target not in _OUT_OF_PLACE:
        return False
    return isinstance(node.args[0], fx.Node) and len(node.args) == 2 and not node.kwargs


def _may_share_memory(
    gm: fx.GraphModule, value: fx.Node, order: dict[fx.Node, int], before: int
) -> set[fx.Node]:
    family = {value}
    frontier = [value]
    while frontier:
        member = frontier.pop()
        related = [user for user in member.users if order[user] < before and may_return_argument(gm, user)]
        if may_return_argument(gm, member):
            related += member.all_input_nodes
        for other in related:
            if other not in family:
                family.add(other)
                frontier.append(other)
    return family


def may_return_argument(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node may hand on one of its arguments, or a view of it."""
    if isinstance(node.target, LoweredChoice) or is_view(gm, node) or is_in_place(gm, node):
        return True
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return not type(module).__module__.startswith("torch.nn")
    return node.op == "output"
