"""Products of a plan's images in Triton, with another or with one number a channel; see steps.py."""

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
    write,
)
from nascompile.kernels.plan.triton_maps import is_idle
from nascompile.kernels.plan.triton_sums import write_moments


@triton.jit(do_not_specialize=["first", "images"])
def gate_kernel(
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
    """Record: flag, image, gate, target, adds, partial sums of the values and their squares."""
    step = record_of(table_ptr, first)
    image, gate, target = step + 1, step + 9, step + 17
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    value = read(slab_ptr, base_of(slab_ptr, work_ptr, image, n, y, x), channel, inside)
    value *= read(slab_ptr, base_of(slab_ptr, work_ptr, gate, n, y, x), channel, inside)
    base = base_of(slab_ptr, work_ptr, target, n, y, x)
    value += read(slab_ptr, base, channel, inside & (tl.load(step + 25) != 0))
    write(slab_ptr, base, channel, value, inside)
    write_moments(work_ptr, tl.load(step + 26), tl.load(target + 5), channel, value, inside)


@triton.jit(do_not_specialize=["first", "images"])
def gate_gradient_kernel(
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
    """Record: flag, gradient, image, target. One program goes over the pixels of one image."""
    step = record_of(table_ptr, first)
    gradient, image, target = step + 1, step + 9, step + 17
    outside = tl.program_id(1) * BLOCK_C >= tl.load(target + 5).to(tl.int32)
    if outside | (is_on(flags_ptr, tl.load(step)) == 0):
        return
    channel = channels_of(BLOCK_C)
    width = tl.load(image + 7).to(tl.int32)
    pixels = tl.load(image + 6).to(tl.int32) * width
    n = tl.program_id(0) + tl.zeros((BLOCK_P,), dtype=tl.int32)
    products = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        y, x, inside = pixel // width, pixel % width, pixel < pixels
        g = read(slab_ptr, base_of(slab_ptr, work_ptr, gradient, n, y, x), channel, inside)
        products += g * read(slab_ptr, base_of(slab_ptr, work_ptr, image, n, y, x), channel, inside)
    start = tl.program_id(0) + tl.zeros((1,), dtype=tl.int32)
    base = base_of(slab_ptr, work_ptr, target, start, start * 0, start * 0)
    before = read(slab_ptr, base, channel, start >= 0)
    write(slab_ptr, base, channel, before + tl.sum(products, 0)[None, :], start >= 0)
