"""The modules that a region understands, as operations on images, in one table; Unsupported says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nascompile.compiler.checks import has_hooks
from nascompile.compiler.region import images
from nascompile.compiler.region.ir import (
    Act,
    Cat,
    Conv,
    Graph,
    Norm,
    Sum,
    TensorRef,
    TermInfo,
    Unsupported,
    Value,
    Weight,
)
from nascompile.compiler.region.types import working_type
from nascompile.kernels.plan.steps import Activation

GROUP_LIMIT = 8
"""Groups of a convolution that are computed one by one; with more of them most lanes would be padding."""

Apply = Callable[[Graph, Any, Value, Weight | None], Value]


def settings_of(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that decide what it means, or whether a region understands it."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    return () if kind is None else tuple(name for name in KINDS[kind].settings if hasattr(module, name))


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The torch.nn class whose forward the module runs, if a region understands it."""
    for kind in KINDS:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if has_hooks(module) or "forward" in module.__dict__ or "parametrizations" in module._modules:
                raise Unsupported(
                    f"{type(module).__name__} has hooks, parametrizations or a replaced forward"
                )
            KINDS[kind].check(module)
            return kind
    raise Unsupported(f"{type(module).__name__} is not understood by regions")


def is_pointwise_module(module: nn.Module) -> bool:
    """Whether a module that a region understands looks at each number by itself."""
    try:
        return KINDS[kind_of(module)].pointwise
    except Unsupported:
        return False


def apply_module(graph: Graph, module: nn.Module, x: Value, owner: Weight | None) -> Value:
    """The value of a module called on `x`."""
    return KINDS[kind_of(module)].apply(graph, module, x, owner)


def _conv(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    if x.channels != module.in_channels:
        raise Unsupported(f"a convolution takes {module.in_channels} channels and gets {x.channels}")
    require_type(graph, module.weight)
    x, padding = _padded(graph, module, x, owner)
    weight, window = TensorRef(module, "weight"), (tuple(module.kernel_size), tuple(module.stride), padding)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    size = images.window_size(x.shape, reach, module.stride, padding)
    # a single filter of one pixel is better off as a dense one
    is_depthwise = _is_depthwise(module) and (module.in_channels > 1 or module.kernel_size != (1, 1))
    groups = 1 if is_depthwise else module.groups
    inputs, outputs = module.in_channels // groups, module.out_channels // groups
    parts = []
    for number in range(groups):
        read = images.some_channels(graph, x, slice(number * inputs, (number + 1) * inputs), owner)
        op = Conv(weight, is_depthwise, outputs, *window, tuple(module.dilation), number * outputs)
        parts.append(graph.add(op, (read,), (outputs, *size), owner))
    return _biased(graph, module, images.concatenated(graph, parts, owner), owner)


def _biased(graph: Graph, module: Any, out: Value, owner: Weight | None) -> Value:
    if module.bias is None:
        return out
    require_type(graph, module.bias)
    bias = Norm(None, TensorRef(module, "bias"), None, None, None, False, False, 0.0, 0.0)
    return _normalised(graph, bias, out, owner)


def _linear(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    """On the one pixel of an image."""
    if x.shape != (module.in_features, 1, 1):
        raise Unsupported(f"a linear layer of {module.in_features} numbers takes an image of {x.shape}")
    require_type(graph, module.weight)
    one, zero = (1, 1), (0, 0)
    op = Conv(TensorRef(module, "weight"), False, module.out_features, one, one, zero, one)
    return _biased(graph, module, graph.add(op, (x,), (module.out_features, 1, 1), owner), owner)


def _is_depthwise(module: Any) -> bool:
    return module.groups == module.in_channels == module.out_channels


def _normalised(graph: Graph, op: Norm, x: Value, owner: Weight | None) -> Value:
    """What a normalisation gives; each part of a concatenation by itself."""
    parts = x.inputs if isinstance(x.op, Cat) else (x,)
    done, first = [], 0
    for part in parts:
        done.append(graph.add(replace(op, first=first), (part,), part.shape, owner))
        first += part.channels
    return done[0] if len(done) == 1 else graph.add(Cat(), done, x.shape, owner)


def _padded(graph: Graph, module: Any, x: Value, owner: Weight | None) -> tuple[Value, tuple[int, int]]:
    """The image that a convolution reads, and how many zeros it adds to all sides."""
    if not isinstance(module.padding, str):
        return x, tuple(module.padding)
    if module.padding == "valid":
        return x, (0, 0)
    down, across = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    if down % 2 == across % 2 == 0:
        return x, (down // 2, across // 2)
    # of an odd number the larger half comes last
    around = (across // 2, across - across // 2, down // 2, down - down // 2)
    return images.padded(graph, x, around, owner), (0, 0)


def require_type(graph: Graph, tensor: torch.Tensor) -> None:
    """Raise Unsupported unless a parameter or buffer is on the plan's device, of a type it computes for."""
    if working_type([tensor.dtype]) != graph.dtype or tensor.device.type != graph.device:
        raise Unsupported(
            f"a parameter is {tensor.dtype} on {tensor.device}, "
            f"the plan computes in {graph.dtype} on {graph.device}"
        )


def _norm(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    if x.channels != module.num_features:
        raise Unsupported(f"a BatchNorm of {module.num_features} channels gets {x.channels}")
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    refs = [None if getattr(module, name) is None else TensorRef(module, name) for name in names]
    for ref in refs[:4]:
        if ref is not None:
            require_type(graph, ref.value)
    *_, mean, variance, counter = refs
    if (mean is None) != (variance is None):
        raise Unsupported("a BatchNorm has one running statistic without the other")
    by_batch = module.training or mean is None
    updates = module.training and module.track_running_stats
    if updates and mean is None and counter is not None:
        raise Unsupported("a BatchNorm counts batches and has no running statistics")
    updates = updates and mean is not None
    # an average over all batches so far stands still without their number
    momentum = (-1.0 if counter is not None else 0.0) if module.momentum is None else float(module.momentum)
    op = Norm(*refs, by_batch, updates, module.eps, momentum)  # type: ignore[arg-type]
    if momentum < 0 and updates:
        # the parts of a norm with a cumulative average would each need the counter
        return graph.add(op, (x,), x.shape, owner)
    return _normalised(graph, op, x, owner)


def _activation(kind: Activation) -> Apply:
    def apply(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
        return graph.add(Act(kind), (x,), x.shape, owner)

    return apply


def _prelu(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    """max(x, 0) + slope * min(x, 0), nan in the second alone, whose gradient it has; in the type that torch
    gives to the second."""
    if module.num_parameters not in (1, x.channels):
        raise Unsupported(f"a PReLU of {module.num_parameters} slopes gets {x.channels} channels")
    is_single = module.num_parameters == 1
    if is_single and graph.device != "cpu":
        raise Unsupported(
            "a PReLU has one slope for all channels, whose gradient is summed up on the CPU only"
        )
    require_type(graph, module.weight)
    slope = TensorRef(module, "weight")
    op = Norm(slope, None, None, None, None, False, False, 0.0, 0.0, is_single=is_single)
    above, below = (
        graph.add(Act(kind), (x,), x.shape, owner) for kind in (Activation.positive, Activation.negative)
    )
    sloped = graph.add(op, (below,), x.shape, owner)
    plain = TermInfo(None, ())
    return graph.add(Sum((plain, plain), 1), (above, sloped), x.shape, owner)


def _same(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    return x


def _max_pool(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    return images.maximum(graph, x, owner, *images.windows(vars(module)))


def _avg_pool(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    counts = bool(module.count_include_pad)
    return images.average(graph, x, owner, *images.windows(vars(module)), counts=counts)


def _global_average(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    return images.average(graph, x, owner, x.shape[1:], x.shape[1:], (0, 0))


def _zero_pad(graph: Graph, module: Any, x: Value, owner: Weight | None) -> Value:
    return images.padded(graph, x, module.padding, owner)


# ---- what their settings say against them


def _anything(module: Any) -> None:
    return


def _require(**expected: Any) -> Callable[[Any], None]:
    def check(module: Any) -> None:
        for name, value in expected.items():
            if getattr(module, name) != value:
                raise Unsupported(
                    f"a {type(module).__name__} has {name} {getattr(module, name)!r}, regions know {value!r}"
                )

    return check


def _check_conv(module: Any) -> None:
    if module.groups > GROUP_LIMIT and not _is_depthwise(module):
        raise Unsupported(f"a convolution of {module.groups} groups is neither dense nor depthwise")
    if module.padding_mode != "zeros":
        raise Unsupported(f"a convolution pads with {module.padding_mode!r}")


def _check_max_pool(module: Any) -> None:
    if module.ceil_mode or module.return_indices or images.pair(module.dilation) != (1, 1):
        raise Unsupported("a max pooling is dilated, rounds up or returns indices")


def _check_avg_pool(module: Any) -> None:
    if module.ceil_mode or module.divisor_override is not None:
        raise Unsupported("an average pooling rounds up or has a divisor of its own")


def _check_dropout(module: Any) -> None:
    if module.training and module.p > 0:
        raise Unsupported("dropout is random")


@dataclass(frozen=True, slots=True)
class Kind:
    """`settings`: the attributes that a module's meaning depends on.

    `check` raises Unsupported for those that are not understood, `apply` gives the value. `pointwise`: it
    looks at each number by itself, so that it serves tensors of any sizes.
    """

    settings: tuple[str, ...]
    apply: Apply
    check: Callable[[Any], None] = _anything
    pointwise: bool = False


def _acts(kind: Activation, **expected: Any) -> Kind:
    check = _require(**expected) if expected else _anything
    return Kind(tuple(expected), _activation(kind), check, pointwise=True)


_WINDOW = ("kernel_size", "stride", "padding", "ceil_mode")
_DROPOUT = Kind(("p", "training"), _same, _check_dropout, pointwise=True)
KINDS: dict[type[nn.Module], Kind] = {
    nn.Conv2d: Kind(("stride", "padding", "dilation", "groups", "padding_mode"), _conv, _check_conv),
    nn.BatchNorm2d: Kind(("eps", "momentum", "training", "track_running_stats"), _norm),
    nn.Linear: Kind(("in_features", "out_features"), _linear),
    nn.ReLU: _acts(Activation.relu),
    nn.ReLU6: _acts(Activation.relu6, min_val=0.0, max_val=6.0),
    nn.Hardswish: _acts(Activation.hardswish),
    nn.Hardsigmoid: _acts(Activation.hardsigmoid),
    nn.SiLU: _acts(Activation.silu),
    nn.Sigmoid: _acts(Activation.sigmoid),
    nn.GELU: _acts(Activation.gelu, approximate="none"),
    nn.LeakyReLU: _acts(Activation.leaky_relu, negative_slope=0.01),
    nn.ELU: _acts(Activation.elu, alpha=1.0),
    nn.PReLU: Kind(("num_parameters",), _prelu),
    nn.Identity: Kind((), _same, pointwise=True),
    nn.Flatten: Kind(("start_dim", "end_dim"), _same),
    nn.Dropout: _DROPOUT,
    nn.Dropout2d: _DROPOUT,
    nn.MaxPool2d: Kind((*_WINDOW, "dilation", "return_indices"), _max_pool, _check_max_pool),
    nn.AvgPool2d: Kind((*_WINDOW, "count_include_pad", "divisor_override"), _avg_pool, _check_avg_pool),
    nn.AdaptiveAvgPool2d: Kind(
        ("output_size",), _global_average, lambda module: images.require_one_pixel(module.output_size)
    ),
    nn.ZeroPad2d: Kind(("padding",), _zero_pad, lambda module: images.require_padding(module.padding)),
}
"""The modules that a region understands."""
