"""The modules and functions that a region understands, as operations on images. Raises Unsupported with the
reason."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nascompile.compiler.guards import has_hooks
from nascompile.compiler.region.ir import (
    Act,
    Cat,
    Channels,
    Conv,
    Crop,
    Graph,
    Norm,
    PoolOp,
    Shape,
    Sum,
    TensorRef,
    TermInfo,
    Unsupported,
    Value,
    Weight,
    Zero,
)
from nascompile.compiler.region.types import working_type
from nascompile.kernels.plan.steps import Activation

Env = dict[fx.Node, Value]
CONFIGURATION: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "momentum", "training", "track_running_stats"),
    nn.ReLU: (),
    nn.ReLU6: ("min_val", "max_val"),
    nn.Identity: (),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.Dropout: ("p", "training"),
}
"""The modules a region understands, and the attributes that their meaning depends on."""


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The torch.nn class whose forward the module runs, if a region understands it."""
    for kind in CONFIGURATION:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if has_hooks(module) or "forward" in module.__dict__ or "parametrizations" in module._modules:
                raise Unsupported(
                    f"{type(module).__name__} has hooks, parametrizations or a replaced forward"
                )
            return kind
    raise Unsupported(f"{type(module).__name__} is not understood by regions")


def apply_module(graph: Graph, module: nn.Module, x: Value, owner: Weight | None) -> Value:
    """The value of a module called on `x`."""
    return _MODULES[kind_of(module)](graph, module, x, owner)


def _conv(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    dense, depthwise = module.groups == 1, module.groups == module.in_channels == module.out_channels
    if not (dense or depthwise):
        raise Unsupported(f"a convolution of {module.groups} groups is neither dense nor depthwise")
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise Unsupported(f"a convolution pads with {module.padding_mode!r}, {module.padding!r}")
    if x.channels != module.in_channels:
        raise Unsupported(f"a convolution takes {module.in_channels} channels and gets {x.channels}")
    require_type(graph, module.weight)
    padding = tuple(module.padding)
    if isinstance(x.op, Crop) and padding != (0, 0):
        raise Unsupported("a convolution pads a cropped image")
    op = Conv(
        TensorRef(module, "weight"),
        depthwise and not (dense and module.in_channels == 1 and module.kernel_size == (1, 1)),
        module.out_channels,
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
    )
    reach = [d * (k - 1) + 1 for d, k in zip(op.dilation, op.kernel, strict=True)]
    size = window_size(x.shape, tuple(reach), op.stride, op.padding)
    out = graph.add(op, (x,), (op.channels, *size), owner)
    if module.bias is None:
        return out
    require_type(graph, module.bias)
    bias = Norm(None, TensorRef(module, "bias"), None, None, None, False, False, 0.0, 0.0)
    return graph.add(bias, (out,), out.shape, owner)


def require_type(graph: Graph, tensor: torch.Tensor) -> None:
    """Raise Unsupported unless a parameter or buffer is on the plan's device, of a type it computes for."""
    if working_type([tensor.dtype]) != graph.dtype or tensor.device.type != graph.device:
        raise Unsupported(
            f"a parameter is {tensor.dtype} on {tensor.device}, "
            f"the plan computes in {graph.dtype} on {graph.device}"
        )


def window_size(
    shape: Shape, reach: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """Height and width after a window of `reach` pixels."""
    height = (shape[1] + 2 * padding[0] - reach[0]) // stride[0] + 1
    width = (shape[2] + 2 * padding[1] - reach[1]) // stride[1] + 1
    if height < 1 or width < 1:
        raise Unsupported(f"a window of {tuple(reach)} pixels does not fit an image of {shape[1:]}")
    return height, width


def _norm(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    if x.channels != module.num_features:
        raise Unsupported(f"a BatchNorm of {module.num_features} channels gets {x.channels}")
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    refs = [None if getattr(module, name) is None else TensorRef(module, name) for name in names]
    for ref in refs[:4]:
        if ref is not None:
            require_type(graph, ref.value)
    by_batch = module.training or module.running_mean is None
    updates = module.training and module.track_running_stats and module.running_mean is not None
    momentum = -1.0 if module.momentum is None else float(module.momentum)
    parts = x.inputs if isinstance(x.op, Cat) else (x,)
    if len(parts) > 1 and momentum < 0 and updates:
        raise Unsupported("a BatchNorm with a cumulative average follows a concatenation")
    done, first = [], 0
    for part in parts:
        op = Norm(*refs, by_batch, updates, module.eps, momentum, first)  # type: ignore[arg-type]
        done.append(graph.add(op, (part,), part.shape, owner))
        first += part.channels
    return done[0] if len(done) == 1 else graph.add(Cat(), done, x.shape, owner)


def _relu(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    return graph.add(Act(Activation.relu), (x,), x.shape, owner)


def _relu6(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    if (module.min_val, module.max_val) != (0.0, 6.0):
        raise Unsupported(f"ReLU6 clips to {module.min_val}, {module.max_val}")
    return graph.add(Act(Activation.relu6), (x,), x.shape, owner)


def _identity(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    return x


def _dropout(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    if module.training and module.p > 0:
        raise Unsupported("dropout is random")
    return x


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _max_pool(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    if module.ceil_mode or module.return_indices or _pair(module.dilation) != (1, 1):
        raise Unsupported("a max pooling is dilated, rounds up or returns indices")
    return _pool(graph, module, x, owner, is_max=True, counts=False)


def _avg_pool(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    if module.ceil_mode or module.divisor_override is not None:
        raise Unsupported("an average pooling rounds up or has a divisor of its own")
    return _pool(graph, module, x, owner, is_max=False, counts=module.count_include_pad)


def _pool(graph: Graph, module: Any, x: Value, owner: Weight | None, *, is_max: bool, counts: bool) -> Value:
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    stride = kernel if module.stride is None else _pair(module.stride)
    if kernel[0] * kernel[1] > 255:
        raise Unsupported(f"a pooling window of {kernel} is too large")
    size = window_size(x.shape, kernel, stride, padding)
    op = PoolOp(is_max, kernel, stride, padding, bool(counts))
    return graph.add(op, (x,), (x.channels, *size), owner)


_MODULES: dict[type[nn.Module], Callable[[Graph, Any, Value, Weight | None], Value]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _norm,
    nn.ReLU: _relu,
    nn.ReLU6: _relu6,
    nn.Identity: _identity,
    nn.Dropout: _dropout,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
}


def apply_function(graph: Graph, node: fx.Node, env: Env, owner: Weight | None) -> Value:
    """The value of a function or method node whose inputs are in `env`."""
    name = node.target if isinstance(node.target, str) else None
    if node.target in (F.relu, torch.relu) or name == "relu":
        _only_arguments(node, 1, {"inplace": False})
        return graph.add(Act(Activation.relu), (_value(node, 0, env),), _value(node, 0, env).shape, owner)
    if node.target is F.relu6:
        _only_arguments(node, 1, {"inplace": False})
        return graph.add(Act(Activation.relu6), (_value(node, 0, env),), _value(node, 0, env).shape, owner)
    if node.target is torch.cat:
        return _cat(graph, node, env, owner)
    if node.target in (operator.add, torch.add) or name == "add":
        _only_arguments(node, 2, {})
        if any(isinstance(arg, int) and arg == 0 for arg in node.args):
            # python's sum() begins with 0 + x
            return _value(node, 1 if node.args[0] == 0 else 0, env)
        return add_up(graph, [_value(node, 0, env), _value(node, 1, env)], owner)
    if node.target is operator.getitem:
        return _crop(graph, node, env, owner)
    if node.target is torch.zeros_like:
        _only_arguments(node, 1, {})
        return graph.add(Zero(_value(node, 0, env).number), (), _value(node, 0, env).shape, owner)
    raise Unsupported(f"{node.format_node()} is not understood by regions")


def _value(node: fx.Node, index: int, env: Env) -> Value:
    arg = node.args[index] if index < len(node.args) else None
    if not isinstance(arg, fx.Node) or arg not in env:
        raise Unsupported(f"{node.format_node()} takes something that is not an image of the region")
    return env[arg]


def _only_arguments(node: fx.Node, count: int, defaults: dict[str, Any]) -> None:
    if len(node.args) != count or any(defaults.get(k, k) != v for k, v in node.kwargs.items()):
        raise Unsupported(f"{node.format_node()} has arguments that regions do not know")


def add_up(graph: Graph, values: Sequence[Value], owner: Weight | None) -> Value:
    """The plain sum of images of one shape."""
    if len({value.shape for value in values}) > 1:
        raise Unsupported(f"a sum broadcasts {[value.shape for value in values]}")
    terms = tuple(TermInfo(None, ()) for _ in values)
    return graph.add(Sum(terms), values, values[0].shape, owner)


def _cat(graph: Graph, node: fx.Node, env: Env, owner: Weight | None) -> Value:
    parts, dim = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, list | tuple) or dim not in (1, -3) or set(node.kwargs) - {"dim"}:
        raise Unsupported(f"{node.format_node()} does not concatenate channels")
    values = [env[part] for part in parts if isinstance(part, fx.Node) and part in env]
    if len(values) != len(parts) or len({value.shape[1:] for value in values}) > 1:
        raise Unsupported(f"{node.format_node()} concatenates something that is not an image of the region")
    if len(values) == 1:
        return values[0]
    flat = [part for v in values for part in (v.inputs if isinstance(v.op, Cat) else (v,))]
    return graph.add(Cat(), flat, (sum(v.channels for v in flat), *flat[0].shape[1:]), owner)


def _channels(graph: Graph, node: fx.Node, x: Value, parts: list[Any], owner: Weight | None) -> Value:
    whole = slice(None, None, None)
    first, _, step = parts[1].indices(x.channels)
    count = len(range(x.channels)[parts[1]])
    if parts[2:] != [whole, whole] or step < 1 or count < 1:
        raise Unsupported(f"{node.format_node()} is not a plain choice of channels")
    return graph.add(Channels(first, step, count), (x,), (count, *x.shape[1:]), owner)


def _crop(graph: Graph, node: fx.Node, env: Env, owner: Weight | None) -> Value:
    x, index = _value(node, 0, env), node.args[1]
    whole = slice(None, None, None)
    if not isinstance(index, tuple) or len(index) > 4 or not all(isinstance(part, slice) for part in index):
        raise Unsupported(f"{node.format_node()} is not a crop")
    parts: list[Any] = [*index, *[whole] * (4 - len(index))]
    for part in parts:
        numbers = (part.start or 0, part.stop, part.step or 1)
        if not all(n is None or isinstance(n, int) for n in numbers):
            raise Unsupported(f"{node.format_node()} has a bound that is not a number")
    if parts[0] != whole:
        raise Unsupported(f"{node.format_node()} takes some samples only")
    if parts[1] != whole:
        return _channels(graph, node, x, parts, owner)
    height, width = (len(range(n)[part]) for n, part in zip(x.shape[1:], parts[2:], strict=True))
    (top, _, step_h), (left, _, step_w) = (
        part.indices(n) for n, part in zip(x.shape[1:], parts[2:], strict=True)
    )
    shape = (x.channels, height, width)
    if all(user.target is torch.zeros_like for user in node.users):
        # only its size counts
        return graph.add(Zero(x.number), (), shape, owner)
    ends = (top + height, left + width) == x.shape[1:] and (step_h, step_w) == (1, 1)
    if not ends or min(top, left) < 0 or min(height, width) < 1:
        raise Unsupported(f"{node.format_node()} is not a crop of the first rows and columns")
    if (top, left) == (0, 0):
        return x
    return graph.add(Crop(top, left), (x,), shape, owner)
