"""Pooling of a plan's maps in Triton, forward and backward; steps.py says what they compute.

Backward asks for every pixel of the image which windows it lies in: nothing is added to twice at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nascompile.kernels.plan.triton_common import (
    base_of,
    channels_of,
    pixels_of,
    read,
    record_of,
    write,
)
from nascompile.kernels.plan.triton_maps import is_idle
from nascompile.kernels.plan.triton_sums import write_moments

SHAPE = tl.constexpr(17)
"""Where the window stands in both records: kernel, stride, padding, counts_padding, index, index_image."""


@triton.jit
def indices(slab_ptr, step, place, n, y, x, channel):
    """Where the numbers of the maxima of these pixels of y lie."""
    width, channels = tl.load(place + 7), tl.load(place + 5)
    image = n.to(tl.int64) * tl.load(step + SHAPE + 8) * 4
    byte = image + (y * width + x) * channels
    start = (slab_ptr + tl.load(step + SHAPE + 7)).to(tl.pointer_type(tl.uint8), bitcast=True)
    return start + byte[:, None] + channel[None, :]


@triton.jit(do_not_specialize=["first", "images"])
def pool_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_MAX: tl.constexpr,
):
    """Record: flag, x, y, window (see SHAPE), partial sums of the values and their squares."""
    step = record_of(table_ptr, first)
    source, target = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    kernel_h, kernel_w = tl.load(step + SHAPE).to(tl.int32), tl.load(step + SHAPE + 1).to(tl.int32)
    top = y * tl.load(step + SHAPE + 2).to(tl.int32) - tl.load(step + SHAPE + 4).to(tl.int32)
    left = x * tl.load(step + SHAPE + 3).to(tl.int32) - tl.load(step + SHAPE + 5).to(tl.int32)
    height, width = tl.load(source + 6).to(tl.int32), tl.load(source + 7).to(tl.int32)
    number = tl.full((BLOCK_P, BLOCK_C), -1, dtype=tl.int32)
    out = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    counted = tl.zeros((BLOCK_P,), dtype=tl.int32)
    for tap in range(kernel_h * kernel_w):
        row, column = top + tap // kernel_w, left + tap % kernel_w
        valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        value = read(slab_ptr, base_of(slab_ptr, work_ptr, source, n, row, column), channel, valid)
        if IS_MAX:
            # the first of equal values stays; nan wins
            wins = valid[:, None] & ((number < 0) | (value > out) | (value != value))
            out = tl.where(wins, value, out)
            number = tl.where(wins, tap, number)
        else:
            out += value
            counted += valid.to(tl.int32)
    if not IS_MAX:
        whole = tl.load(step + SHAPE + 6) != 0
        divisor = tl.where(whole, kernel_h * kernel_w, tl.maximum(counted, 1))
        out = out / divisor.to(tl.float32)[:, None]
    if IS_MAX:  # noqa: SIM102  (the inner condition is known at run time only)
        if tl.load(step + SHAPE + 7) >= 0:
            to = indices(slab_ptr, step, target, n, y, x, channel)
            tl.store(to, number.to(tl.uint8), mask=inside[:, None])
    write(slab_ptr, base_of(slab_ptr, work_ptr, target, n, y, x), channel, out, inside)
    out = tl.where(inside[:, None], out, 0.0)
    write_moments(work_ptr, tl.load(step + SHAPE + 9), tl.load(target + 5), channel, out, inside)


@triton.jit
def reached(size, kernel, stride, padding, number):
    """How many pixels of the image a window covers along one dimension."""
    start = number * stride - padding
    return tl.minimum(start + kernel, size) - tl.maximum(start, 0)


@triton.jit(do_not_specialize=["first", "images"])
def pool_backward_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_MAX: tl.constexpr,
):
    """Record: flag, dy, dx, window (see SHAPE)."""
    step = record_of(table_ptr, first)
    source, target = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    kernel_h, kernel_w = tl.load(step + SHAPE).to(tl.int32), tl.load(step + SHAPE + 1).to(tl.int32)
    stride_h, stride_w = tl.load(step + SHAPE + 2).to(tl.int32), tl.load(step + SHAPE + 3).to(tl.int32)
    above, before = tl.load(step + SHAPE + 4).to(tl.int32), tl.load(step + SHAPE + 5).to(tl.int32)
    height, width = tl.load(source + 6).to(tl.int32), tl.load(source + 7).to(tl.int32)
    rows, columns = tl.load(target + 6).to(tl.int32), tl.load(target + 7).to(tl.int32)
    base = base_of(slab_ptr, work_ptr, target, n, y, x)
    total = read(slab_ptr, base, channel, inside)
    for tap in range(kernel_h * kernel_w):
        down, across = y + above - tap // kernel_w, x + before - tap % kernel_w
        row, column = down // stride_h, across // stride_w
        valid = inside & (down >= 0) & (row * stride_h == down) & (row < height)
        valid &= (across >= 0) & (column * stride_w == across) & (column < width)
        dy = read(slab_ptr, base_of(slab_ptr, work_ptr, source, n, row, column), channel, valid)
        if IS_MAX:
            at = indices(slab_ptr, step, source, n, row, column, channel)
            number = tl.load(at, mask=valid[:, None], other=255).to(tl.int32)
            total += tl.where(number == tap, dy, 0.0)
        else:
            count = reached(rows, kernel_h, stride_h, above, row)
            count *= reached(columns, kernel_w, stride_w, before, column)
            whole = tl.load(step + SHAPE + 6) != 0
            divisor = tl.where(whole, kernel_h * kernel_w, tl.maximum(count, 1))
            total += dy / divisor.to(tl.float32)[:, None]
    write(slab_ptr, base, channel, total, inside)
