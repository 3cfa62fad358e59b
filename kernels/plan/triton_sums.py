"""Sums over the pixels of a tile, in Triton: taken in fp32 about the mean of the tile, handed on as plain
sums in fp64.

BatchNorm subtracts the square of the mean from the squares, and the mean times the gradients from the
products: where the mean is much larger than the deviation, plain sums in fp32 have lost those digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

_FARTHEST = tl.constexpr(1e30)
"""Distances from a larger mean may have no place in fp32."""


@triton.jit
def doubles(work_ptr):
    """Work memory in fp64: where sums and their partial sums lie."""
    return work_ptr.to(tl.pointer_type(tl.float64), bitcast=True)


@triton.jit
def write_share(work_ptr, at, width, channel, value):
    """Write a tile's share of a sum, which a later launch adds to the others: [tile][width] doubles from
    `at`."""
    tl.store(doubles(work_ptr) + at + tl.program_id(0) * width + channel, value)


@triton.jit
def mean_of(value, pixels):
    """The mean of values that are zero outside; zero where it is not finite or too large."""
    mean = tl.sum(value, 0) / pixels.to(tl.float32)
    return tl.where(tl.abs(mean) < _FARTHEST, mean, 0.0)


@triton.jit
def write_moments(work_ptr, at, channels, channel, value, inside):
    """Write a tile's share of the sums of values, which are zero outside, and of their squares; `at` is
    negative where nobody asks for them."""
    if at >= 0:
        pixels = tl.sum(inside.to(tl.int32), 0)
        mean = mean_of(value, pixels)
        away = tl.where(inside[:, None], value - mean[None, :], 0.0)
        total, squares = tl.sum(away, 0).to(tl.float64), tl.sum(away * away, 0).to(tl.float64)
        middle = mean.to(tl.float64)
        whole = total + pixels.to(tl.float64) * middle
        write_share(work_ptr, at, 2 * channels, channel, whole)
        write_share(work_ptr, at + channels, 2 * channels, channel, squares + middle * (total + whole))


@triton.jit
def write_products(work_ptr, at, width, channel, gradient, total, value, pixels):
    """Write a tile's share of the sum of gradient * value, both zero outside; `total`: that of gradients."""
    mean = mean_of(value, pixels)
    products = tl.sum(gradient * (value - mean[None, :]), 0).to(tl.float64)
    products += mean.to(tl.float64) * total.to(tl.float64)
    write_share(work_ptr, at, width, channel, products)
