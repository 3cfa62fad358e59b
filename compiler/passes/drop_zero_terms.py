"""Removes additions of zeros, such as those of a chosen `none` operation, and with them what only gave the
zeros a shape."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from nascompile.compiler.inplace import base_of, mutated_value

_MAKES_ZEROS = frozenset({torch.zeros_like, torch.zeros})
_METHODS_MAKING_ZEROS = frozenset({"new_zeros"})
_KEEPS_ZERO = frozenset(
    (
        operator.getitem,
        operator.neg,
        operator.truediv,
        torch.neg,
        torch.relu,
        F.relu,
        F.avg_pool2d,
        F.max_pool2d,
        torch.Tensor.repeat,
        F.dropout,
    )
)
_METHODS_KEEPING_ZERO = frozenset(
    [
        "repeat",
        "expand",
        "contiguous",
        "view",
        "reshape",
        "flatten",
        "permute",
        "transpose",
        "relu",
        "neg",
        "clone",
        "detach",
        "to",
        "div",
    ]
)
_ADDITIONS = frozenset({operator.add, torch.add})
_PRODUCTS = frozenset({operator.mul, torch.mul})


def drop_zero_terms(gm: fx.GraphModule) -> int:
    """Replace `a + zeros` by `a` where both have the shape and type of the sum (`node.meta["layout"]`).

    Legal because adding zero changes no value, and no gradient flows into zeros made from a shape. Nodes
    without a known layout are left alone, and so is whatever is changed in place: zeros then are none,
    and the sum must not be one object with its term. `x * 0` counts as zeros: for finite x it is.
    """
    changed = _changed(gm)
    zeros = _zeros(gm, changed)
    dropped = 0
    for node in list(gm.graph.nodes):
        if not _is_binary(node, _ADDITIONS) or node in zeros:
            continue
        for term, other in (node.args, node.args[::-1]):
            if not isinstance(other, fx.Node) or node in changed or base_of(gm, other) in changed:
                continue
            if _is_zero(term, zeros) and _same_layout(node, other):
                node.replace_all_uses_with(other)
                gm.graph.erase_node(node)
                dropped += 1
                break
    return dropped


def makes_zeros(gm: fx.GraphModule) -> bool:
    """Whether there are zeros in the graph at all."""
    return bool(_zeros(gm, _changed(gm)))


def _changed(gm: fx.GraphModule) -> set[fx.Node]:
    return {base_of(gm, value) for node in gm.graph.nodes if (value := mutated_value(gm, node)) is not None}


def _zeros(gm: fx.GraphModule, changed: set[fx.Node]) -> set[fx.Node]:
    zeros: set[fx.Node] = set()
    for node in gm.graph.nodes:
        made = node.op == "call_function" and node.target in _MAKES_ZEROS
        made = made or (node.op == "call_method" and node.target in _METHODS_MAKING_ZEROS)
        by_zero = _is_binary(node, _PRODUCTS) and any(_is_zero(arg, zeros) for arg in node.args)
        sum_of_zeros = _is_binary(node, _ADDITIONS) and all(_is_zero(arg, zeros) for arg in node.args)
        keeps = (node.op == "call_function" and node.target in _KEEPS_ZERO) or (
            node.op == "call_method" and node.target in _METHODS_KEEPING_ZERO
        )
        kept = keeps and bool(node.args) and node.args[0] in zeros
        if (made or by_zero or sum_of_zeros or kept) and base_of(gm, node) not in changed:
            zeros.add(node)
    return zeros


def _is_binary(node: fx.Node, targets: frozenset[object]) -> bool:
    return node.op == "call_function" and node.target in targets and len(node.args) == 2 and not node.kwargs


def _is_zero(value: object, zeros: set[fx.Node]) -> bool:
    return value in zeros if isinstance(value, fx.Node) else isinstance(value, int | float) and value == 0


def _same_layout(node: fx.Node, other: fx.Node) -> bool:
    layout = node.meta.get("layout")
    return layout is not None and layout == other.meta.get("layout")


class LayoutRecorder(fx.Interpreter):
    """Runs a graph and adds the shape and type of every tensor to the tuple `node.meta["layout"]`."""

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["layout"] = (*n.meta.get("layout", ()), tuple(value.shape), value.dtype)
        return value
