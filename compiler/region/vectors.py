"""What lies between the images of a region without being one: sizes, and tensors of one number a channel on
their way from a pooling to a gate.

A tensor is an image of the region seen with other sizes: flattening, views and means change the sizes, a
linear layer is a convolution of its one pixel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from nascompile.compiler.region import images
from nascompile.compiler.region.ir import Graph, Unsupported, Value, Weight
from nascompile.compiler.region.operations import apply_module

BATCH = "batch"
"""Stands for the number of images among sizes."""

Size = int | str | None
"""Of one dimension; None where it is not known yet."""
Sizes = tuple[Size, ...]
IMAGE: Sizes = (BATCH, None, None, None)
"""What is known of an image before there is one."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An image as a tensor of other sizes, its numbers in the same order."""

    image: Value
    sizes: Sizes


def sizes_of(value: Value | Seen) -> Sizes:
    """The sizes of the tensor that a value stands for."""
    return value.sizes if isinstance(value, Seen) else (BATCH, *value.shape)


def seen(image: Value, sizes: Sizes) -> Value | Seen:
    """The image itself where it has these sizes. Raises Unsupported for an image of other sizes."""
    if sizes == (BATCH, *image.shape):
        return image
    if len(sizes) == len(IMAGE):
        raise Unsupported(f"an image of {image.shape} is seen as one of {sizes[1:]}")
    return Seen(image, sizes)


# ---- what the sizes become


def _dimension(sizes: Sizes, dim: Any, more: int = 0) -> int:
    count = len(sizes) + more
    if not isinstance(dim, int) or not -count <= dim < count or dim % count == 0:
        raise Unsupported(f"dimension {dim} of a tensor of {len(sizes)} is not one behind the batch")
    return dim % count


def _viewed(sizes: Sizes, *wanted: Any) -> Sizes:
    if len(wanted) == 1 and isinstance(wanted[0], list | tuple):
        wanted = tuple(wanted[0])
    given = [None if isinstance(size, fx.Node) else size for size in wanted]
    if not all(size is None or size == BATCH or isinstance(size, int) for size in given):
        raise Unsupported(f"a view has the sizes {wanted}")
    if None in given or None in sizes[1:]:
        # before there are images: which is the batch can only be told from what is a number
        if not given or (isinstance(given[0], int) and given[0] != -1):
            raise Unsupported("a view has a fixed number of samples")
        return (BATCH, *(None if size == -1 else size for size in given[1:]))
    count = prod(size for size in sizes[1:] if isinstance(size, int))
    own = [size for size in given[1:] if isinstance(size, int)]
    if len(own) != len(given) - 1 or given[0] not in (BATCH, -1) or own.count(-1) > (given[0] == BATCH):
        raise Unsupported(f"a view as {given} does not keep the samples apart")
    known = prod(size for size in own if size != -1)
    if known < 1 or count % known or (-1 not in own and known != count):
        raise Unsupported(f"a view as {given} of {sizes} does not keep the samples apart")
    return (BATCH, *(count // known if size == -1 else size for size in own))


def _flattened(sizes: Sizes, start_dim: Any = 0, end_dim: Any = -1) -> Sizes:
    first, last = _dimension(sizes, start_dim), _dimension(sizes, end_dim)
    if last <= first:
        return sizes
    inner = sizes[first : last + 1]
    whole = None if None in inner else prod(size for size in inner if isinstance(size, int))
    return (*sizes[:first], whole, *sizes[last + 1 :])


def _squeezed(sizes: Sizes, *dims: Any) -> Sizes:
    if len(dims) != 1:
        raise Unsupported("squeeze is not given one dimension")
    (dim,) = dims
    numbers = {_dimension(sizes, d) for d in (dim if isinstance(dim, list | tuple) else (dim,))}
    if any(sizes[d] not in (1, None) for d in numbers):
        raise Unsupported(f"squeezes dimensions {sorted(numbers)} of {sizes}")
    return tuple(size for d, size in enumerate(sizes) if d not in numbers)


def _unsqueezed(sizes: Sizes, dim: Any = None) -> Sizes:
    at = _dimension(sizes, dim, 1)
    return (*sizes[:at], 1, *sizes[at:])


def _indexed(sizes: Sizes, index: Any = None) -> Sizes:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at, taken = parts.index(Ellipsis), sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (len(sizes) - taken)
    rest, found = list(sizes), []
    for part in parts:
        if part is None:
            found.append(1)
        elif isinstance(part, slice) and part == slice(None) and rest:
            found.append(rest.pop(0))
        else:
            raise Unsupported(f"takes {index} of a tensor")
    if not found or found[0] != BATCH:
        raise Unsupported(f"takes {index} of a tensor")
    return (*found, *rest)


def _averaged(sizes: Sizes, dim: Any = None, keepdim: Any = False) -> Sizes:
    numbers = {_dimension(sizes, d) for d in (dim if isinstance(dim, list | tuple) else (dim,))}
    if not numbers or 1 in numbers or not isinstance(keepdim, bool):
        raise Unsupported("a mean is not one over the pixels")
    kept = [1 if d in numbers else size for d, size in enumerate(sizes)]
    return tuple(size for d, size in enumerate(kept) if keepdim or d not in numbers)


def _through(sizes: Sizes, inputs: int, outputs: int) -> Sizes:
    if len(sizes) != 2 or sizes[1] not in (inputs, None):
        raise Unsupported(f"a linear layer of {inputs} numbers is not given one number a channel")
    return BATCH, outputs


Resize = Callable[..., Sizes]
_RESIZES: dict[str, tuple[Resize, tuple[str, ...]]] = {
    "view": (_viewed, ("size",)),
    "reshape": (_viewed, ("shape",)),
    "flatten": (_flattened, ("start_dim", "end_dim")),
    "squeeze": (_squeezed, ("dim",)),
    "unsqueeze": (_unsqueezed, ("dim",)),
    "getitem": (_indexed, ()),
    "mean": (_averaged, ("dim", "keepdim")),
}
"""What gives a tensor other sizes, and the names of its arguments behind the tensor."""
_FUNCTIONS: dict[Any, str] = {
    operator.getitem: "getitem",
    torch.reshape: "reshape",
    torch.flatten: "flatten",
    torch.squeeze: "squeeze",
    torch.unsqueeze: "unsqueeze",
    torch.mean: "mean",
}


def resize_of(
    node: fx.Node, module: nn.Module | None, *, of_image: bool
) -> tuple[str, list[Any], dict[str, Any]] | None:
    """What gives a tensor other sizes, and its arguments behind the tensor; None for any other operation.

    `of_image`: it is given an image; crops, and means that keep their dimensions, are operations on images.
    """
    if isinstance(module, nn.Linear):
        return "linear", [module.in_features, module.out_features], {}
    if isinstance(module, nn.Flatten):
        return "flatten", [module.start_dim, module.end_dim], {}
    name = str(node.target) if node.op == "call_method" else _FUNCTIONS.get(node.target)
    if node.op not in ("call_method", "call_function") or name not in _RESIZES:
        return None
    if of_image and name == "mean" and node.kwargs.get("keepdim", (*node.args, None, None)[2]) is True:
        return None
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if all(part is not None for part in index):
            return None
    return name, list(node.args[1:]), dict(node.kwargs)


def asks_for_sizes(node: fx.Node) -> bool:
    """Whether a node is `x.size()`, `x.size(dim)` or `x.shape`."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) <= 2 and not node.kwargs
    return node.target is getattr and node.args[1:] == ("shape",)


def is_expansion(node: fx.Node) -> bool:
    """Whether a node is `x.expand_as(y)`."""
    return node.op == "call_method" and node.target == "expand_as" and len(node.args) == 2


def resized(sizes: Sizes, name: str, args: list[Any], kwargs: Mapping[str, Any]) -> Sizes:
    """The sizes of the result; Unsupported says what a region does not know."""
    if name == "linear":
        return _through(sizes, *args)
    function, names = _RESIZES[name]
    positional = [kwargs[key] for key in names[len(args) :] if key in kwargs]
    if set(kwargs) - set(names[len(args) :]) or len(positional) < len(kwargs):
        raise Unsupported(f"{name} has arguments that regions do not know")
    if kwargs and name == "mean" and "dim" in names[len(args) :] and "dim" not in kwargs:
        raise Unsupported("a mean is not one over the pixels")
    if kwargs and name == "flatten" and not args and "start_dim" not in kwargs:
        raise Unsupported("flattens the batch")
    return function(sizes, *args, *positional)


# ---- values


def apply_resize(
    graph: Graph,
    x: Value | Seen,
    module: nn.Module | None,
    resize: tuple[str, list[Any], dict[str, Any]],
    owner: Weight | None,
) -> Value | Seen:
    """A tensor with other sizes: itself, its mean over the pixels, or what a linear layer makes of it."""
    name, args, kwargs = resize
    sizes = resized(sizes_of(x), name, args, kwargs)
    image = x.image if isinstance(x, Seen) else x
    if name == "linear":
        assert module is not None
        return seen(apply_module(graph, module, image, owner), sizes)
    if name == "mean":
        return seen(_mean(graph, x, args[0] if args else kwargs["dim"], owner), sizes)
    return seen(image, sizes)


def _mean(graph: Graph, x: Value | Seen, dim: Any, owner: Weight | None) -> Value:
    before = sizes_of(x)
    dims = {_dimension(before, d) for d in (dim if isinstance(dim, list | tuple) else (dim,))}
    if isinstance(x, Value):
        window = (x.shape[1] if 2 in dims else 1, x.shape[2] if 3 in dims else 1)
        return images.average(graph, x, owner, window, window, (0, 0))
    left = [size for d, size in enumerate(before) if d > 1 and d not in dims]
    if before[1] != x.image.channels or any(size != 1 for size in left):
        raise Unsupported(f"a mean over {sorted(dims)} of a tensor of {before} is not one over all pixels")
    pixels = x.image.shape[1:]
    return images.average(graph, x.image, owner, pixels, pixels, (0, 0))


def asked_size(x: Value | Seen, dim: Any = None) -> Any:
    """`x.size(dim)`, or all sizes without `dim`."""
    sizes = sizes_of(x)
    return sizes if dim is None else sizes[dim]
