"""Which nodes of a graph change a value in place, and which values are views of others."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from nascompile.compiler.trace import is_builtin

_OPERATORS = frozenset(
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
) | {operator.setitem}
# methods and functions whose result may share memory with their first argument
_VIEWS = frozenset(
    (
        "view",
        "ravel",
        "unflatten",
        "swapdims",
        "moveaxis",
        "broadcast_to",
        "as_strided",
        "tensor_split",
        "split_with_sizes",
        "hsplit",
        "vsplit",
        "dsplit",
        "adjoint",
        "real",
        "imag",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "data",
        "H",
        "mH",
        "bfloat16",
        "cpu",
        "cuda",
        "einsum",
        "reshape",
        "permute",
        "transpose",
        "t",
        "squeeze",
        "unsqueeze",
        "expand",
        "narrow",
        "select",
        "chunk",
        "split",
        "unbind",
        "flatten",
        "getitem",
        "contiguous",
        "detach",
        "T",
        "mT",
        "to",
        "type_as",
        "float",
        "half",
        "double",
        "movedim",
        "swapaxes",
        "unfold",
        "view_as",
        "expand_as",
        "getattr",
        "diagonal",
    )
)


def is_in_place(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node changes its first argument."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if node.target in _OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return True
    return bool(node.kwargs.get("inplace", False))


def mutated_value(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose value `node` changes in place, or None."""
    if not is_in_place(gm, node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0]


def changed_values(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes whose values `node` may change in place: all, for a module that was not looked into."""
    if node.op == "call_module" and not is_builtin(gm.get_submodule(str(node.target))):
        return list(node.all_input_nodes)
    out = node.kwargs.get("out")
    value = mutated_value(gm, node)
    return [one for one in (value, out) if isinstance(one, fx.Node)]


def base_of(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Follow views and in-place results back to the node that made the memory."""
    while is_view(gm, node) or is_in_place(gm, node):
        if not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def is_view(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the result may share memory with the first argument (said too often rather than too rarely)."""
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        return isinstance(module, nn.Identity | nn.Flatten | nn.Unflatten | _DropoutNd)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and (name in _VIEWS or "dropout" in name)
