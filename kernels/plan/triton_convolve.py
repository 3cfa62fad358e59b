"""Convolutions of a plan in Triton: depthwise, dense, both in one, and the gradients of their weights.

The source of a record is the image seen from the output: its row and pixel strides are already multiplied by
the stride of the convolution, and taps are offsets in it. So the gradient of the input is a convolution too,
one for every rectangle of pixels with the same taps (steps.Grid).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nascompile.kernels.plan.triton_common import (
    base_of,
    channels_of,
    is_on,
    pixels_of,
    read,
    record_of,
    size_of,
    write,
)
from nascompile.kernels.plan.triton_maps import is_idle
from nascompile.kernels.plan.triton_sums import write_moments

TAPS = tl.constexpr(17)
"""Where taps stand in all records, after flag and two maps: how many, where, the weights' offset."""


@triton.jit
def depthwise_tile(slab_ptr, table_ptr, step, at, base, channel, inside, total):
    """The depthwise convolution at a tile of pixels; `at`: where its taps stand in the record."""
    taps = table_ptr + tl.load(step + at + 1)
    weights = slab_ptr + tl.multiple_of(tl.load(step + at + 2), 16)
    channels = tl.load(step + 6)
    for k in range(tl.load(step + at).to(tl.int32)):
        offset = tl.multiple_of(tl.load(taps + 2 * k), 16)
        weight = tl.load(weights + tl.load(taps + 2 * k + 1) * channels + channel)
        total += read(slab_ptr, base + offset, channel, inside) * weight[None, :]
    return total


@triton.jit
def finish(slab_ptr, work_ptr, step, target, at, n, y, x, channel, inside, total):
    """Store a tile of the output, or add to it, and its partial sums; `at`: where [adds][sums] stand."""
    base = base_of(slab_ptr, work_ptr, target, n, y, x)
    total += read(slab_ptr, base, channel, inside & (tl.load(step + at) != 0))
    write(slab_ptr, base, channel, total, inside)
    # zero outside, as what was read there
    write_moments(work_ptr, tl.load(step + at + 1), tl.load(target + 5), channel, total, inside)


@triton.jit(do_not_specialize=["first", "images"])
def depthwise_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Record: flag, source, target, taps, weights, adds, partial sums."""
    step = record_of(table_ptr, first)
    source, target = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    base = base_of(slab_ptr, work_ptr, source, n, y, x)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    total = depthwise_tile(slab_ptr, table_ptr, step, TAPS, base, channel, inside, total)
    finish(slab_ptr, work_ptr, step, target, TAPS + 3, n, y, x, channel, inside, total)


@triton.jit(do_not_specialize=["first", "images"])
def dense_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Record: flag, source, target, taps, weights, adds, partial sums."""
    step = record_of(table_ptr, first)
    source, target = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    base = base_of(slab_ptr, work_ptr, source, n, y, x)
    taps = table_ptr + tl.load(step + TAPS + 1)
    weights = slab_ptr + tl.multiple_of(tl.load(step + TAPS + 2), 16)
    inputs, outputs = tl.load(source + 5).to(tl.int32), tl.load(target + 5).to(tl.int32)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for k in range(tl.load(step + TAPS).to(tl.int32)):
        offset = tl.multiple_of(tl.load(taps + 2 * k), 16)
        row = tl.load(taps + 2 * k + 1) * inputs
        for begin in range(0, inputs, BLOCK_I):
            i = begin + tl.arange(0, BLOCK_I)
            value = read(slab_ptr, base + offset, i, inside)
            at = tl.multiple_of((row + i) * outputs, 16)
            weight = tl.load(weights + at[:, None] + channel[None, :])
            total = tl.dot(value, weight, total, input_precision=PRECISION)
    finish(slab_ptr, work_ptr, step, target, TAPS + 3, n, y, x, channel, inside, total)


@triton.jit(do_not_specialize=["first", "images"])
def separable_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Record: flag, source, target, depthwise taps and weights, 0, partial sums, pointwise weights."""
    step = record_of(table_ptr, first)
    source, target = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    base = base_of(slab_ptr, work_ptr, source, n, y, x)
    weights = slab_ptr + tl.multiple_of(tl.load(step + TAPS + 5), 16)
    inputs, outputs = tl.load(source + 5).to(tl.int32), tl.load(target + 5).to(tl.int32)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for begin in range(0, inputs, BLOCK_I):
        i = begin + tl.arange(0, BLOCK_I)
        value = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
        value = depthwise_tile(slab_ptr, table_ptr, step, TAPS, base, i, inside, value)
        at = tl.multiple_of(i * outputs, 16)
        weight = tl.load(weights + at[:, None] + channel[None, :])
        total = tl.dot(value, weight, total, input_precision=PRECISION)
    finish(slab_ptr, work_ptr, step, target, TAPS + 3, n, y, x, channel, inside, total)


@triton.jit(do_not_specialize=["first", "images"])
def dense_gradient_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Record: flag, source, dy, taps, depthwise weights, shares of the pixels, partial sums
    [share][tap][in][out].

    With DEPTHWISE the taps are those of the depthwise part and the gradient is that of the pointwise part
    after it.
    """
    step = record_of(table_ptr, first)
    source, place = step + 1, step + 9
    inputs, outputs = tl.load(source + 5).to(tl.int32), tl.load(place + 5).to(tl.int32)
    count, shares = tl.load(step + TAPS).to(tl.int32), tl.load(step + TAPS + 3).to(tl.int32)
    if DEPTHWISE:
        count = 1
    across, down = outputs // BLOCK_C, inputs // BLOCK_I
    block, share = tl.program_id(1), tl.program_id(0)
    if (is_on(flags_ptr, tl.load(step)) == 0) | (block >= count * across * down) | (share >= shares):
        return
    o = block % across * BLOCK_C + tl.arange(0, BLOCK_C)
    i = block // across % down * BLOCK_I + tl.arange(0, BLOCK_I)
    k = block // (across * down)
    offset = tl.multiple_of(tl.load(table_ptr + tl.load(step + TAPS + 1) + 2 * k), 16)
    total = tl.zeros((BLOCK_I, BLOCK_C), dtype=tl.float32)
    tiles = tl.cdiv(size_of(place, images), BLOCK_P)
    for tile in range(share, tiles, shares):
        n, y, x, inside = pixels_of(place, images, tile, BLOCK_P)
        base = base_of(slab_ptr, work_ptr, source, n, y, x)
        if DEPTHWISE:
            value = tl.zeros((BLOCK_P, BLOCK_I), dtype=tl.float32)
            value = depthwise_tile(slab_ptr, table_ptr, step, TAPS, base, i, inside, value)
        else:
            value = read(slab_ptr, base + offset, i, inside)
        dy = read(slab_ptr, base_of(slab_ptr, work_ptr, place, n, y, x), o, inside)
        total = tl.dot(tl.trans(value), dy, total, input_precision=PRECISION)
    at = work_ptr + tl.load(step + TAPS + 4) + (share * count + k).to(tl.int64) * (inputs * outputs)
    tl.store(at + (i * outputs)[:, None] + o[None, :], total)


@triton.jit(do_not_specialize=["first", "images"])
def depthwise_gradient_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Record: flag, source, dd, taps, nothing, nothing, partial sums [tile][tap][channels]."""
    step = record_of(table_ptr, first)
    source, place = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), place, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(place, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    gradient = read(slab_ptr, base_of(slab_ptr, work_ptr, place, n, y, x), channel, inside)
    base = base_of(slab_ptr, work_ptr, source, n, y, x)
    count, channels = tl.load(step + TAPS).to(tl.int32), tl.load(place + 5)
    taps = table_ptr + tl.load(step + TAPS + 1)
    sums = work_ptr + tl.load(step + TAPS + 4) + channel
    for k in range(count):
        offset = tl.multiple_of(tl.load(taps + 2 * k), 16)
        value = read(slab_ptr, base + offset, channel, inside)
        row = tl.program_id(0) * count + k
        tl.store(sums + row * channels, tl.sum(value * gradient, 0))
