"""Steps of a plan that go over maps pixel by pixel, in Triton; steps.py says what each computes.

A program has a tile of BLOCK_P pixels of all images and a block of BLOCK_C channels. Sums over pixels are
written as one row of partial sums for every tile (triton_sums.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nascompile.kernels.plan.triton_activations import activate, hand_back, passes
from nascompile.kernels.plan.triton_common import (
    MAP,
    TERM,
    base_of,
    channels_of,
    is_on,
    logical_of,
    pixels_of,
    read,
    record_of,
    size_of,
    tensor_at,
    vector,
    write,
)
from nascompile.kernels.plan.triton_sums import write_moments, write_products, write_share


@triton.jit
def is_idle(flags_ptr, flag, map_ptr, images, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether there is nothing to do: the step is off, or this program is outside of its map."""
    outside = tl.program_id(0) * BLOCK_P >= size_of(map_ptr, images)
    outside |= tl.program_id(1) * BLOCK_C >= tl.load(map_ptr + 5).to(tl.int32)
    return outside | (is_on(flags_ptr, flag) == 0)


@triton.jit
def sum_of_terms(
    slab_ptr, work_ptr, table_ptr, flags_ptr, count, at, constant, n, y, x, inside, channel, like
):
    """The sum of the terms and the constant; zero outside."""
    total = like
    for k in range(count):
        term = table_ptr + at + TERM * k
        on = is_on(flags_ptr, tl.load(term + MAP + 1))
        value = read(slab_ptr, base_of(slab_ptr, work_ptr, term, n, y, x), channel, inside & on)
        factor = vector(slab_ptr, tl.load(term + MAP), channel, 1.0)
        # what a term that is off would have been multiplied with may be anything
        total += tl.where(on, value * factor[None, :], 0.0)
    total += vector(slab_ptr, constant, channel, 0.0)[None, :]
    return tl.where(inside[:, None], total, 0.0)


@triton.jit(do_not_specialize=["first", "images"])
def load_kernel(
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
    """Record: flag, tensor, four strides, segments, adds, target."""
    step = record_of(table_ptr, first)
    target = step + 9
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    logical = logical_of(table_ptr, tl.load(step + 6), tl.load(step + 7), channel)
    pixel = n.to(tl.int64) * tl.load(step + 2) + y * tl.load(step + 4) + x * tl.load(step + 5)
    source = tensor_at(pointers_ptr, tl.load(step + 1), tl.float32) + pixel[:, None]
    there = inside[:, None] & (logical >= 0)[None, :]
    value = tl.load(source + (logical * tl.load(step + 3))[None, :], mask=there, other=0.0)
    base = base_of(slab_ptr, work_ptr, target, n, y, x)
    value += read(slab_ptr, base, channel, inside & (tl.load(step + 8) != 0))
    write(slab_ptr, base, channel, value, inside)


@triton.jit(do_not_specialize=["first", "images"])
def store_kernel(
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
    """Record: flag, tensor, four strides, segments, nothing, source."""
    step = record_of(table_ptr, first)
    source = step + 9
    if is_idle(flags_ptr, tl.load(step), source, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(source, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    logical = logical_of(table_ptr, tl.load(step + 6), tl.load(step + 7), channel)
    pixel = n.to(tl.int64) * tl.load(step + 2) + y * tl.load(step + 4) + x * tl.load(step + 5)
    target = tensor_at(pointers_ptr, tl.load(step + 1), tl.float32) + pixel[:, None]
    value = read(slab_ptr, base_of(slab_ptr, work_ptr, source, n, y, x), channel, inside)
    there = inside[:, None] & (logical >= 0)[None, :]
    tl.store(target + (logical * tl.load(step + 3))[None, :], value, mask=there)


@triton.jit(do_not_specialize=["first", "images"])
def stage_kernel(
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
    """Record: flag, source, scale, shift, activation, target."""
    step = record_of(table_ptr, first)
    source, target = step + 1, step + 12
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    value = read(slab_ptr, base_of(slab_ptr, work_ptr, source, n, y, x), channel, inside)
    value = value * vector(slab_ptr, tl.load(step + 9), channel, 1.0)[None, :]
    value = value + vector(slab_ptr, tl.load(step + 10), channel, 0.0)[None, :]
    value = activate(value, tl.load(step + 11))
    write(slab_ptr, base_of(slab_ptr, work_ptr, target, n, y, x), channel, value, inside)


@triton.jit(do_not_specialize=["first", "images"])
def combine_kernel(
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
    """Record: flag, target, terms, constant, activation, adds, partial sums of the values and their
    squares."""
    step = record_of(table_ptr, first)
    target = step + 1
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    terms, zero = tl.load(step + 9), tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    total = sum_of_terms(
        slab_ptr,
        work_ptr,
        table_ptr,
        flags_ptr,
        terms,
        tl.load(step + 10),
        tl.load(step + 11),
        n,
        y,
        x,
        inside,
        channel,
        zero,
    )
    total = tl.where(inside[:, None], activate(total, tl.load(step + 12)), 0.0)
    base = base_of(slab_ptr, work_ptr, target, n, y, x)
    total += read(slab_ptr, base, channel, inside & (tl.load(step + 13) != 0))
    write(slab_ptr, base, channel, total, inside)
    write_moments(work_ptr, tl.load(step + 14), tl.load(target + 5), channel, total, inside)


@triton.jit(do_not_specialize=["first", "images"])
def reduce_kernel(
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
    """Record: flag, gradient, terms, whether the plain sum is wanted, partial sums (terms, then the plain
    one)."""
    step = record_of(table_ptr, first)
    place = step + 1
    if is_idle(flags_ptr, tl.load(step), place, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(place, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    gradient = read(slab_ptr, base_of(slab_ptr, work_ptr, place, n, y, x), channel, inside)
    channels, count, sums = tl.load(place + 5), tl.load(step + 9), tl.load(step + 12)
    width, pixels = (count + 1) * channels, tl.sum(inside.to(tl.int32), 0)
    total = tl.sum(gradient, 0)
    for k in range(count):
        term = table_ptr + tl.load(step + 10) + TERM * k
        if is_on(flags_ptr, tl.load(term + MAP + 1)):
            value = read(slab_ptr, base_of(slab_ptr, work_ptr, term, n, y, x), channel, inside)
            at = sums + k * channels
            write_products(work_ptr, at, width, channel, gradient, total, value, pixels)
    if tl.load(step + 11) != 0:
        write_share(work_ptr, sums + count * channels, width, channel, total.to(tl.float64))


@triton.jit(do_not_specialize=["first", "images"])
def unstage_kernel(
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
    """Record: flag, gradient, source, scale, shift, activation, target, adds, partial sums of g and g *
    source."""
    step = record_of(table_ptr, first)
    gradient, source, target = step + 1, step + 9, step + 20
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    g = read(slab_ptr, base_of(slab_ptr, work_ptr, gradient, n, y, x), channel, inside)
    activation, sums = tl.load(step + 19), tl.load(step + 29)
    needed = inside & ((activation > 0) | (sums >= 0))
    value = read(slab_ptr, base_of(slab_ptr, work_ptr, source, n, y, x), channel, needed)
    scale = vector(slab_ptr, tl.load(step + 17), channel, 1.0)[None, :]
    shift = vector(slab_ptr, tl.load(step + 18), channel, 0.0)[None, :]
    g = hand_back(g, value * scale + shift, activation)
    base = base_of(slab_ptr, work_ptr, target, n, y, x)
    before = read(slab_ptr, base, channel, inside & (tl.load(step + 28) != 0))
    write(slab_ptr, base, channel, before + g, inside)
    channels = tl.load(target + 5)
    if sums >= 0:
        total, pixels = tl.sum(g, 0), tl.sum(inside.to(tl.int32), 0)
        write_share(work_ptr, sums, 2 * channels, channel, total.to(tl.float64))
        write_products(work_ptr, sums + channels, 2 * channels, channel, g, total, value, pixels)


@triton.jit(do_not_specialize=["first", "images"])
def mask_kernel(
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
    """Record: flag, gradient, value, activation."""
    step = record_of(table_ptr, first)
    gradient, place = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), gradient, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(gradient, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    base = base_of(slab_ptr, work_ptr, gradient, n, y, x)
    value = read(slab_ptr, base_of(slab_ptr, work_ptr, place, n, y, x), channel, inside)
    g = tl.where(passes(value, tl.load(step + 17)), read(slab_ptr, base, channel, inside), 0.0)
    write(slab_ptr, base, channel, g, inside)


@triton.jit(do_not_specialize=["first", "images"])
def pick_kernel(
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
    """Record: flag, source, target, first and step in the source and in the target, count, adds."""
    step = record_of(table_ptr, first)
    source, target = step + 1, step + 9
    if is_idle(flags_ptr, tl.load(step), target, images, BLOCK_P, BLOCK_C):
        return
    n, y, x, inside = pixels_of(target, images, tl.program_id(0), BLOCK_P)
    channel = channels_of(BLOCK_C)
    away, stride = channel - tl.load(step + 19).to(tl.int32), tl.load(step + 20).to(tl.int32)
    count = tl.load(step + 21).to(tl.int32)
    number = away // tl.maximum(stride, 1)
    picked = (away >= 0) & (number * stride == away) & (number < count)
    base = base_of(slab_ptr, work_ptr, source, n, y, x)
    value = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    # of one channel that many come to, each takes a turn
    turns = tl.where(stride == 0, count, 1)
    for turn in range(turns):
        other = tl.load(step + 17) + (number + turn) * tl.load(step + 18)
        there = inside[:, None] & picked[None, :]
        value += tl.load(slab_ptr + base[:, None] + other[None, :], mask=there, other=0.0)
    base = base_of(slab_ptr, work_ptr, target, n, y, x)
    value += read(slab_ptr, base, channel, inside & (tl.load(step + 22) != 0))
    write(slab_ptr, base, channel, value, inside)
