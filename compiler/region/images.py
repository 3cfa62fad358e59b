"""Operations on the images of a region, as modules and functions ask for them; Unsupported says what cannot
be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nascompile.compiler.region.ir import (
    Cat,
    Channels,
    Crop,
    Gate,
    Graph,
    Pad,
    PoolOp,
    Shape,
    Spread,
    Sum,
    TermInfo,
    Unsupported,
    Value,
    Weight,
)

Pair = tuple[int, int]
Windows = tuple[Pair, Pair, Pair]
INDEX_LIMIT = 255
"""Pixels of a window whose maximum is known by one byte."""


def added(graph: Graph, values: Sequence[Value], owner: Weight | None, *, in_place: bool = False) -> Value:
    """The plain sum of images of one shape; `in_place`: in the type of the first."""
    if len({value.shape for value in values}) > 1:
        raise Unsupported(f"a sum broadcasts {[value.shape for value in values]}")
    terms = tuple(TermInfo(None, ()) for _ in values)
    return graph.add(Sum(terms, 0 if in_place else None), values, values[0].shape, owner)


def multiplied(
    graph: Graph, one: Value, other: Value, owner: Weight | None, *, in_place: bool = False
) -> Value:
    """The product of two images, either of which may have one channel or one pixel for all.

    `in_place`: in the type of the first.
    """
    if 1 in (one.channels, other.channels):
        one, other = _spread(graph, one, other, owner), _spread(graph, other, one, owner)
    image, gate = (other, one) if one.shape[1:] == (1, 1) else (one, other)
    like = int(image is not one) if in_place else None
    if gate.shape not in (image.shape, (image.channels, 1, 1)):
        raise Unsupported(f"a product broadcasts {[image.shape, gate.shape]}")
    return graph.add(Gate(like), (image, gate), image.shape, owner)


def _spread(graph: Graph, x: Value, like: Value, owner: Weight | None) -> Value:
    """An image of one channel with as many as another."""
    if x.channels == like.channels or x.channels != 1:
        return x
    return graph.add(Spread(like.layout), (x,), (like.channels, *x.shape[1:]), owner)


def concatenated(graph: Graph, values: Sequence[Value], owner: Weight | None) -> Value:
    """The channels of all images."""
    if len({value.shape[1:] for value in values}) > 1:
        raise Unsupported(f"images of {[value.shape for value in values]} are concatenated")
    if len(values) == 1:
        return values[0]
    flat = [part for v in values for part in (v.inputs if isinstance(v.op, Cat) else (v,))]
    return graph.add(Cat(), flat, (sum(v.channels for v in flat), *flat[0].shape[1:]), owner)


def some_channels(graph: Graph, x: Value, part: slice, owner: Weight | None) -> Value:
    """x[:, part]."""
    first, _, step = part.indices(x.channels)
    count = len(range(x.channels)[part])
    if (first, step, count) == (0, 1, x.channels):
        return x
    if step < 1 or count < 1:
        raise Unsupported(f"{part} of {x.channels} channels is no choice of channels")
    return graph.add(Channels(first, step, count), (x,), (count, *x.shape[1:]), owner)


def cropped(graph: Graph, x: Value, rows: slice, columns: slice, owner: Weight | None) -> Value:
    """x[:, :, rows, columns]."""
    height, width = (len(range(n)[part]) for n, part in zip(x.shape[1:], (rows, columns), strict=True))
    (top, _, down), (left, _, right) = rows.indices(x.shape[1]), columns.indices(x.shape[2])
    if min(height, width) < 1 or min(down, right) < 1:
        raise Unsupported(f"rows {rows} and columns {columns} of an image of {x.shape[1:]} are no crop")
    shape = (x.channels, height, width)
    if shape == x.shape:
        return x
    return graph.add(Crop(top, left, down, right), (x,), shape, owner)


def require_padding(amounts: Any) -> None:
    """Raise Unsupported unless these are numbers of zeros left, right, above and below."""
    numbers = amounts if isinstance(amounts, list | tuple) else ()
    if len(numbers) != 4 or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise Unsupported(f"pads an image by {amounts}")


def padded(graph: Graph, x: Value, amounts: Sequence[int], owner: Weight | None) -> Value:
    """Zeros left, right, above and below."""
    left, right, top, bottom = amounts
    if not any(amounts):
        return x
    shape = (x.channels, x.shape[1] + top + bottom, x.shape[2] + left + right)
    return graph.add(Pad(top, left), (x,), shape, owner)


# ---- windows


def pair(value: Any) -> Pair:
    """A number for both directions, or one for each."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 2:
        raise Unsupported(f"{value} is not a pair of numbers")
    if not all(isinstance(n, int) for n in value):
        raise Unsupported(f"{value} is not a pair of numbers")
    return value[0], value[-1]


def windows(settings: Mapping[str, Any]) -> Windows:
    """Kernel, stride and padding of a pooling."""
    kernel, stride = pair(settings["kernel_size"]), settings.get("stride")
    has_stride = stride is not None and stride != ()
    return kernel, pair(stride) if has_stride else kernel, pair(settings.get("padding", 0))


def require_windows(settings: Mapping[str, Any]) -> None:
    """Raise Unsupported unless kernel, stride and padding are numbers."""
    if "kernel_size" not in settings:
        raise Unsupported("a pooling has no window")
    windows(settings)


def require_one_pixel(size: Any) -> None:
    """Raise Unsupported unless an adaptive pooling gives one pixel."""
    if size not in (1, (1, 1), [1, 1], (1,), [1]):
        raise Unsupported(f"an adaptive pooling gives {size} pixels, not one")


def window_size(shape: Shape, reach: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Pair:
    """Height and width after a window of `reach` pixels."""
    height = (shape[1] + 2 * padding[0] - reach[0]) // stride[0] + 1
    width = (shape[2] + 2 * padding[1] - reach[1]) // stride[1] + 1
    if height < 1 or width < 1:
        raise Unsupported(f"a window of {tuple(reach)} pixels does not fit an image of {shape[1:]}")
    return height, width


def maximum(graph: Graph, x: Value, owner: Weight | None, kernel: Pair, stride: Pair, padding: Pair) -> Value:
    """Max pooling."""
    if kernel[0] * kernel[1] > INDEX_LIMIT:
        raise Unsupported(f"a max pooling's window of {kernel} is too large")
    size = window_size(x.shape, kernel, stride, padding)
    return graph.add(PoolOp(True, kernel, stride, padding, False), (x,), (x.channels, *size), owner)


def average(
    graph: Graph,
    x: Value,
    owner: Weight | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    *,
    counts: bool = True,
) -> Value:
    """Average pooling; `counts`: the padding counts."""
    size = window_size(x.shape, kernel, stride, padding)
    # without padding it is the same
    counts = counts and any(padding)
    return graph.add(PoolOp(False, kernel, stride, padding, counts), (x,), (x.channels, *size), owner)
