"""The input gradient of a convolution as stride-one convolutions of the output's gradient, one a class of
pixels.

With stride s, input pixel h receives from output row r by tap i where h = r*s - p + i*d, so the pixels with
equal remainder modulo s have the same taps, and read neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from nascompile.compiler.region.ir import Conv
from nascompile.kernels.plan.steps import Grid, Map, Tap


def input_grids(op: Conv, crop: tuple[int, int], size: tuple[int, int], padded: Map) -> tuple[Grid, ...]:
    """Grids that cover every pixel of an input of `size` once; taps are offsets in `padded`, the output's
    gradient.

    `crop`: the first row and column of the input that the convolution sees.
    """
    found = []
    for top in range(min(op.stride[0], size[0])):
        for left in range(min(op.stride[1], size[1])):
            rows = tuple(_taps(op, 0, top, crop[0]))
            columns = tuple(_taps(op, 1, left, crop[1]))
            taps = tuple(
                Tap(row * padded.row + column * padded.pixel, i * op.kernel[1] + j)
                for i, row in rows
                for j, column in columns
            )
            height = len(range(top, size[0], op.stride[0]))
            width = len(range(left, size[1], op.stride[1]))
            found.append(Grid(top, left, *op.stride, height, width, taps))
    return tuple(found)


def _taps(op: Conv, axis: int, first: int, crop: int) -> Iterator[tuple[int, int]]:
    """(tap, output row that pixel `first` receives from by it); the k-th pixel of the class reads k rows
    further."""
    for tap in range(op.kernel[axis]):
        reach = first - crop + op.padding[axis] - tap * op.dilation[axis]
        if reach % op.stride[axis] == 0:
            yield tap, reach // op.stride[axis]


def grid_border(
    op: Conv, crop: tuple[int, int], size: tuple[int, int], out: tuple[int, int]
) -> tuple[int, int]:
    """The zeros around the output's gradient that the grids read, above and below, and left and right."""
    found = []
    for axis in range(2):
        over = 0
        for first in range(min(op.stride[axis], size[axis])):
            count = len(range(first, size[axis], op.stride[axis]))
            for _, row in _taps(op, axis, first, crop[axis]):
                over = max(over, -row, row + count - out[axis])
        found.append(over)
    return found[0], found[1]
