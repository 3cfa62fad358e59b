"""The functions and methods that a region understands, as operations on images, in one table.

What the arguments say is checked before a region is made (`why_not_function`), so that an operation that is
not understood splits the region; what depends on sizes is found when a plan is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from nascompile.compiler.passes.functionalize_in_place import out_of_place
from nascompile.compiler.region import images
from nascompile.compiler.region.ir import Act, Graph, Unsupported, Value, Weight, Zero
from nascompile.kernels.plan.steps import Activation

Env = dict[fx.Node, Any]
"""What nodes give: images, sizes, and images seen with other sizes."""
Arguments = dict[str, Any]
_IN_PLACE = "in place"
"""Among the arguments: whether the function changes its first one, and so keeps its type."""


def _anything(_: Arguments) -> None:
    return


@dataclass(frozen=True, slots=True)
class Function:
    """`names`: of the parameters, of which the first `images` are images, or with `numbers` numbers.

    `apply(graph, arguments, owner)` gives the value; `check` raises Unsupported for other arguments that are
    not understood. `pointwise`: it looks at each number by itself, so that it serves tensors of any sizes.
    """

    names: tuple[str, ...]
    apply: Callable[[Graph, Arguments, Weight | None], Value]
    check: Callable[[Arguments], None] = _anything
    images: int = 1
    numbers: bool = False
    pointwise: bool = False


def why_not_function(node: fx.Node) -> str | None:
    """Why a function or method cannot be part of a region, whatever the sizes; None if it can."""
    try:
        if node.target is operator.getitem:
            _check_slices(node)
        elif node.target is torch.cat:
            _check_cat(node)
        elif node.target is torch.zeros_like:
            _require_image(node, node.args[0])
        else:
            function, arguments = _bound(node)
            for name in function.names[: function.images]:
                if not (function.numbers and _is_number(arguments.get(name))):
                    _require_image(node, arguments.get(name))
            function.check(arguments)
    except Unsupported as reason:
        return str(reason)
    return None


def is_pointwise_function(node: fx.Node) -> bool:
    """Whether a function or method looks at each number of one tensor by itself."""
    try:
        function, arguments = _bound(node)
        function.check(arguments)
    except Unsupported:
        return False
    tensors = [name for name in function.names[: function.images] if not _is_number(arguments.get(name))]
    return function.pointwise and tensors == [function.names[0]]


def apply_function(graph: Graph, node: fx.Node, env: Env, owner: Weight | None) -> Value:
    """The value of a function or method node whose inputs are in `env`."""
    if node.target is torch.cat:
        parts = _check_cat(node)
        return images.concatenated(graph, [_value(node, part, env) for part in parts], owner)
    if node.target is operator.getitem:
        return _slice(graph, node, env, owner)
    if node.target is torch.zeros_like:
        x = _value(node, node.args[0], env)
        return graph.add(Zero(x.number), (), x.shape, owner)
    function, arguments = _bound(node)
    function.check(arguments)
    for name in function.names[: function.images]:
        if not (function.numbers and _is_number(arguments.get(name))):
            arguments[name] = _value(node, arguments.get(name), env)
    return function.apply(graph, arguments, owner)


def _value(node: fx.Node, argument: Any, env: Env) -> Value:
    if not isinstance(argument, fx.Node) or not isinstance(env.get(argument), Value):
        raise Unsupported(f"{node.format_node()} takes something that is not an image of the region")
    return env[argument]


def _require_image(node: fx.Node, argument: Any) -> None:
    if not isinstance(argument, fx.Node) or argument.op == "get_attr":
        raise Unsupported(f"{node.name} takes something that is not an image")


def _bound(node: fx.Node) -> tuple[Function, Arguments]:
    """The row of the table for a node, and its arguments by name."""
    target, given = node.target, node.args
    if target is out_of_place:
        target, given = getattr(operator, str(given[0])), given[1:]
    function = _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)
    if function is None:
        name = getattr(target, "__name__", target)
        raise Unsupported(f"{node.name} ({name}) is not understood by regions")
    arguments = {**dict(zip(function.names, given, strict=False)), **node.kwargs}
    if len(given) > len(function.names) or set(arguments) - set(function.names):
        raise Unsupported(f"{node.name} has arguments that regions do not know")
    return function, {**arguments, _IN_PLACE: node.target is out_of_place or _is_in_place(target)}


def _is_in_place(target: Any) -> bool:
    if isinstance(target, str):
        return target.endswith("_")
    return target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def _is_number(argument: Any) -> bool:
    return isinstance(argument, int | float)


# ---- rows of the table


def _require(arguments: Arguments, **expected: Any) -> None:
    for name, value in expected.items():
        found = arguments.get(name, value)
        if found != value:
            raise Unsupported(f"{name} is {found!r}, regions know {value!r}")


def _activation(kind: Activation, *more: str, **expected: Any) -> Function:
    def apply(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
        x: Value = arguments["input"]
        return graph.add(Act(kind), (x,), x.shape, owner)

    return Function(
        ("input", *more), apply, lambda arguments: _require(arguments, **expected), pointwise=True
    )


def _add(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    one, other = arguments["input"], arguments["other"]
    if _is_number(one) or _is_number(other):
        x, number = (other, one) if _is_number(one) else (one, other)
        return graph.scale(x, 1.0, float(number), owner)
    return images.added(graph, [one, other], owner, in_place=arguments[_IN_PLACE])


def _subtract(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    one, other = arguments["input"], arguments["other"]
    if _is_number(other):
        return graph.scale(one, 1.0, -float(other), owner)
    if _is_number(one):
        return graph.scale(other, -1.0, float(one), owner)
    negative = graph.scale(other, -1.0, 0.0, owner)
    return images.added(graph, [one, negative], owner, in_place=arguments[_IN_PLACE])


def _multiply(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    one, other = arguments["input"], arguments["other"]
    if _is_number(one) or _is_number(other):
        x, number = (other, one) if _is_number(one) else (one, other)
        return graph.scale(x, float(number), 0.0, owner)
    return images.multiplied(graph, one, other, owner, in_place=arguments[_IN_PLACE])


def _negate(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    return graph.scale(arguments["input"], -1.0, 0.0, owner)


def _check_divide(arguments: Arguments) -> None:
    if not _is_number(arguments.get("other")) or arguments["other"] == 0:
        raise Unsupported("divides by something else than a number")


def _divide(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    return graph.scale(arguments["input"], 1 / float(arguments["other"]), 0.0, owner)


def _dimensions(arguments: Arguments) -> set[int]:
    dim = arguments.get("dim")
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    return {d % 4 if isinstance(d, int) else -1 for d in dims}


def _check_mean(arguments: Arguments) -> None:
    if not _dimensions(arguments) <= {2, 3} or arguments.get("keepdim") is not True:
        raise Unsupported("a mean is not one of rows and columns that keeps them")


def _mean(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    x, dims = arguments["input"], _dimensions(arguments)
    window = (x.shape[1] if 2 in dims else 1, x.shape[2] if 3 in dims else 1)
    return images.average(graph, x, owner, window, window, (0, 0))


def _check_adaptive(arguments: Arguments) -> None:
    images.require_one_pixel(arguments.get("output_size"))


def _adaptive(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    x = arguments["input"]
    return images.average(graph, x, owner, x.shape[1:], x.shape[1:], (0, 0))


def _check_max(arguments: Arguments) -> None:
    _require(arguments, ceil_mode=False, return_indices=False)
    images.require_windows(arguments)
    if images.pair(arguments.get("dilation", 1)) != (1, 1):
        raise Unsupported("a max pooling is dilated")


def _max_pool(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    return images.maximum(graph, arguments["input"], owner, *images.windows(arguments))


def _check_average(arguments: Arguments) -> None:
    _require(arguments, ceil_mode=False, divisor_override=None)
    images.require_windows(arguments)


def _avg_pool(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    counts = bool(arguments.get("count_include_pad", True))
    return images.average(graph, arguments["input"], owner, *images.windows(arguments), counts=counts)


def _check_dropout(arguments: Arguments) -> None:
    if arguments.get("training", True) and arguments.get("p", 0.5) != 0:
        raise Unsupported("dropout is random")


def _input(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    return arguments["input"]


def _check_pad(arguments: Arguments) -> None:
    _require(arguments, mode="constant")
    if arguments.get("value") not in (None, 0):
        raise Unsupported(f"pads with {arguments['value']}")
    images.require_padding(arguments.get("pad"))


def _pad(graph: Graph, arguments: Arguments, owner: Weight | None) -> Value:
    return images.padded(graph, arguments["input"], arguments["pad"], owner)


_TWO = ("input", "other")
_SUM = Function(_TWO, _add, images=2, numbers=True, pointwise=True)
_DIFFERENCE = Function(_TWO, _subtract, images=2, numbers=True, pointwise=True)
_PRODUCT = Function(_TWO, _multiply, images=2, numbers=True, pointwise=True)
_QUOTIENT = Function(_TWO, _divide, _check_divide, pointwise=True)
_NEGATIVE = Function(("input",), _negate, pointwise=True)
_MEAN = Function(("input", "dim", "keepdim"), _mean, _check_mean)
_RELU = _activation(Activation.relu, "inplace")
_SIGMOID = _activation(Activation.sigmoid)
_SILU = _activation(Activation.silu, "inplace")
_DROPOUT = Function(("input", "p", "training", "inplace"), _input, _check_dropout, pointwise=True)
_WINDOW = ("input", "kernel_size", "stride", "padding")
_FUNCTIONS: dict[Any, Function] = {
    F.relu: _RELU,
    torch.relu: _RELU,
    torch.relu_: _RELU,
    F.relu6: _activation(Activation.relu6, "inplace"),
    F.hardswish: _activation(Activation.hardswish, "inplace"),
    F.hardsigmoid: _activation(Activation.hardsigmoid, "inplace"),
    F.silu: _SILU,
    F.sigmoid: _SIGMOID,
    torch.sigmoid: _SIGMOID,
    F.gelu: _activation(Activation.gelu, "approximate", approximate="none"),
    F.leaky_relu: _activation(Activation.leaky_relu, "negative_slope", "inplace", negative_slope=0.01),
    F.elu: _activation(Activation.elu, "alpha", "inplace", alpha=1.0),
    operator.add: _SUM,
    operator.iadd: _SUM,
    torch.add: _SUM,
    operator.sub: _DIFFERENCE,
    operator.isub: _DIFFERENCE,
    torch.sub: _DIFFERENCE,
    operator.mul: _PRODUCT,
    operator.imul: _PRODUCT,
    torch.mul: _PRODUCT,
    operator.truediv: _QUOTIENT,
    operator.itruediv: _QUOTIENT,
    torch.div: _QUOTIENT,
    operator.neg: _NEGATIVE,
    torch.neg: _NEGATIVE,
    torch.mean: _MEAN,
    F.adaptive_avg_pool2d: Function(("input", "output_size"), _adaptive, _check_adaptive),
    F.max_pool2d: Function((*_WINDOW, "dilation", "ceil_mode", "return_indices"), _max_pool, _check_max),
    F.avg_pool2d: Function(
        (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override"), _avg_pool, _check_average
    ),
    F.dropout: _DROPOUT,
    F.dropout2d: _DROPOUT,
    F.pad: Function(("input", "pad", "mode", "value"), _pad, _check_pad),
}
_METHODS: dict[str, Function] = {
    "relu": _RELU,
    "relu_": _RELU,
    "sigmoid": _SIGMOID,
    "add": _SUM,
    "add_": _SUM,
    "sub": _DIFFERENCE,
    "sub_": _DIFFERENCE,
    "mul": _PRODUCT,
    "mul_": _PRODUCT,
    "div": _QUOTIENT,
    "div_": _QUOTIENT,
    "neg": _NEGATIVE,
    "mean": _MEAN,
}


# ---- concatenations and slices


def _check_cat(node: fx.Node) -> list[Any]:
    """The parts of a concatenation of channels."""
    parts, dim = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, list | tuple) or dim not in (1, -3) or set(node.kwargs) - {"dim"}:
        raise Unsupported(f"{node.name} does not concatenate channels")
    for part in parts:
        _require_image(node, part)
    return list(parts)


def _check_slices(node: fx.Node) -> list[slice]:
    """The four slices of an index."""
    index, whole = node.args[1], slice(None, None, None)
    if not isinstance(index, tuple) or len(index) > 4 or not all(isinstance(part, slice) for part in index):
        raise Unsupported(f"{node.name} is not a crop")
    parts: list[Any] = [*index, *[whole] * (4 - len(index))]
    bounds = [n for part in parts for n in (part.start, part.stop, part.step)]
    if not all(n is None or isinstance(n, int) for n in bounds):
        raise Unsupported(f"{node.name} has a bound that is not a number")
    if parts[0] != whole:
        raise Unsupported(f"{node.name} takes some samples only")
    return parts


def _slice(graph: Graph, node: fx.Node, env: Env, owner: Weight | None) -> Value:
    x, parts = _value(node, node.args[0], env), _check_slices(node)
    if all(user.target is torch.zeros_like for user in node.users):
        # only its size counts
        shape = tuple(len(range(n)[part]) for n, part in zip(x.shape, parts[1:], strict=True))
        return graph.add(Zero(x.number), (), shape, owner)  # type: ignore[arg-type]
    return images.cropped(graph, images.some_channels(graph, x, parts[1], owner), parts[2], parts[3], owner)
