"""Barrier operations of a plan in Triton, and the sums of partial sums; steps.py says what each computes.

One launch carries out many operations of one kind, a record each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nascompile.kernels.plan.triton_common import (
    as_double,
    is_on,
    logical_of,
    record_of,
    tensor_at,
    vector,
)
from nascompile.kernels.plan.triton_sums import doubles


@triton.jit
def sums_at(work_ptr, offset, channel, mask):
    """Sums over the batch, which lie at the begin of work memory."""
    return tl.load(doubles(work_ptr) + offset + channel, mask=mask & (offset >= 0), other=0.0)


@triton.jit
def weight_of(pointers_ptr, decision, index):
    """A weight of the decision, in fp64; one where there is none."""
    pointer = tensor_at(pointers_ptr, tl.maximum(decision, 0), tl.float32)
    return tl.load(pointer + index, mask=index >= 0, other=1.0).to(tl.float64)


@triton.jit(do_not_specialize=["first", "images"])
def add_up_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SUMS: tl.constexpr,
):
    """Adds partial sums to the sums (IS_SUMS: both in fp64) or gradients (both in fp32), in a fixed order.

    Record: flag, another flag, partial sums, rows, numbers from row to row, columns, offset of the target.
    """
    step = record_of(table_ptr, first)
    columns = tl.load(step + 5)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = is_on(flags_ptr, tl.load(step)) & is_on(flags_ptr, tl.load(step + 1))
    if (on == 0) | (tl.program_id(0) * BLOCK >= columns):
        return
    rows, width = tl.load(step + 3).to(tl.int32), tl.load(step + 4)
    memory = doubles(work_ptr) if IS_SUMS else work_ptr
    source, target = memory + tl.load(step + 2) + column, memory + tl.load(step + 6) + column
    total = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float64)
    for begin in range(0, rows, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        there = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(source[None, :] + (row * width)[:, None], mask=there, other=0.0)
        total += value.to(tl.float64)
    before = tl.load(target, mask=column < columns, other=0.0).to(tl.float64)
    found = before + tl.sum(total, 0)
    tl.store(target, found.to(memory.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["first", "images"])
def pack_depthwise_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Record: flag, tensor, taps, segments, channels, offset: in the slab, or in work memory for
    unpacking."""
    step = record_of(table_ptr, first)
    count, channels = tl.load(step + 2).to(tl.int32), tl.load(step + 5).to(tl.int32)
    if (is_on(flags_ptr, tl.load(step)) == 0) | (tl.program_id(0) * BLOCK >= count * channels):
        return
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logical = logical_of(table_ptr, tl.load(step + 3), tl.load(step + 4), element % channels)
    inside = element < count * channels
    there = inside & (logical >= 0)
    tensor = tensor_at(pointers_ptr, tl.load(step + 1), tl.float32) + logical * count + element // channels
    if PACKS:
        value = tl.load(tensor, mask=there, other=0.0)
        tl.store(slab_ptr + tl.load(step + 6) + element, value, mask=inside)
    else:
        value = tl.load(work_ptr + tl.load(step + 6) + element, mask=inside, other=0.0)
        tl.store(tensor, value, mask=there)


@triton.jit(do_not_specialize=["first", "images"])
def pack_dense_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Record: flag, tensor, taps, segments of inputs and of outputs, channels of both, the tensor's inputs,
    offset (in the slab, or in work memory for unpacking), offset of the transposed."""
    step = record_of(table_ptr, first)
    count = tl.load(step + 2).to(tl.int32)
    inputs, outputs = tl.load(step + 7).to(tl.int32), tl.load(step + 8).to(tl.int32)
    size = count * inputs * outputs
    if (is_on(flags_ptr, tl.load(step)) == 0) | (tl.program_id(0) * BLOCK >= size):
        return
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o, i, tap = element % outputs, element // outputs % inputs, element // (outputs * inputs)
    inside = element < size
    source = logical_of(table_ptr, tl.load(step + 3), tl.load(step + 4), i)
    target = logical_of(table_ptr, tl.load(step + 5), tl.load(step + 6), o)
    there = inside & (source >= 0) & (target >= 0)
    at = (target * tl.load(step + 9).to(tl.int32) + source) * count + tap
    tensor = tensor_at(pointers_ptr, tl.load(step + 1), tl.float32) + at
    packed, transposed = tl.load(step + 10), tl.load(step + 11)
    if PACKS:
        value = tl.load(tensor, mask=there, other=0.0)
        tl.store(slab_ptr + packed + element, value, mask=inside & (packed >= 0))
        turned = (tap * outputs + o) * inputs + i
        tl.store(slab_ptr + transposed + turned, value, mask=inside & (transposed >= 0))
    else:
        value = tl.load(work_ptr + packed + element, mask=inside, other=0.0)
        tl.store(tensor, value, mask=there)


@triton.jit
def statistic(pointers_ptr, number, logical, missing):
    """A tensor's values at padded channels, in fp64; zero for padding, `missing` where there is no tensor."""
    pointer = tensor_at(pointers_ptr, tl.maximum(number, 0), tl.float32)
    value = tl.load(pointer + logical, mask=(logical >= 0) & (number >= 0), other=missing).to(tl.float64)
    return tl.where(logical >= 0, value, 0.0)


@triton.jit
def update(pointers_ptr, number, logical, momentum, batch):
    """running = (1 - momentum) * running + momentum * batch, where there is a tensor."""
    there = (logical >= 0) & (number >= 0)
    pointer = tensor_at(pointers_ptr, tl.maximum(number, 0), tl.float32) + logical
    before = tl.load(pointer, mask=there, other=0.0).to(tl.float64)
    tl.store(pointer, (before * (1 - momentum) + momentum * batch).to(tl.float32), mask=there)


# one warp: the counter is read by all its threads before one of them writes it
@triton.jit(do_not_specialize=["first", "images"])
def normalise_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK: tl.constexpr,
):
    """Record: flag, moments, elements, epsilon, momentum, gamma, beta, running mean, variance, counter,
    segments, channels, out."""
    step = record_of(table_ptr, first)
    if is_on(flags_ptr, tl.load(step)) == 0:
        return
    moments, channels = tl.load(step + 1), tl.load(step + 12).to(tl.int32)
    elements, momentum = tl.load(step + 2).to(tl.float64), as_double(tl.load(step + 4))
    counter = tl.load(step + 9)
    if (counter >= 0) & (moments >= 0):
        pointer = tensor_at(pointers_ptr, counter, tl.int64)
        seen = tl.load(pointer) + 1
        tl.debug_barrier()
        tl.store(pointer, seen)
        momentum = tl.where(momentum < 0, 1.0 / seen.to(tl.float64), momentum)
    out = slab_ptr + tl.load(step + 13)
    for begin in range(0, channels, BLOCK):
        channel = begin + tl.arange(0, BLOCK)
        inside = channel < channels
        logical = logical_of(table_ptr, tl.load(step + 10), tl.load(step + 11), channel)
        logical = tl.where(inside, logical, -1)
        mean = statistic(pointers_ptr, tl.load(step + 7), logical, 0.0)
        variance = statistic(pointers_ptr, tl.load(step + 8), logical, 1.0)
        if moments >= 0:
            mean = sums_at(work_ptr, moments, channel, inside) / elements
            variance = sums_at(work_ptr, moments + channels, channel, inside) / elements - mean * mean
            variance = tl.where(variance < 0, 0.0, variance)
            update(pointers_ptr, tl.load(step + 7), logical, momentum, mean)
            unbiased = variance * elements / tl.maximum(elements - 1, 1.0)
            update(pointers_ptr, tl.load(step + 8), logical, momentum, unbiased)
        # what is padded may have a variance of zero and an epsilon of zero
        wide = tl.where(logical >= 0, variance + as_double(tl.load(step + 3)), 1.0)
        inverse = tl.where(logical >= 0, 1.0 / tl.sqrt(wide), 0.0)
        scale = statistic(pointers_ptr, tl.load(step + 5), logical, 1.0) * inverse
        shift = statistic(pointers_ptr, tl.load(step + 6), logical, 0.0) - mean * scale
        tl.store(out + channel, mean.to(tl.float32), mask=inside)
        tl.store(out + channels + channel, inverse.to(tl.float32), mask=inside)
        tl.store(out + 2 * channels + channel, scale.to(tl.float32), mask=inside)
        tl.store(out + 3 * channels + channel, shift.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["first", "images"])
def coefficients_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK: tl.constexpr,
):
    """Record: flag, terms (weight, scale, shift, out, flag), decision, constant, channels."""
    step = record_of(table_ptr, first)
    channels = tl.load(step + 5).to(tl.int32)
    if (is_on(flags_ptr, tl.load(step)) == 0) | (tl.program_id(0) * BLOCK >= channels):
        return
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # outside of the vector nothing is read or written
    valid = tl.where(channel < channels, channel, -1)
    constant = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(tl.load(step + 1)):
        term = table_ptr + tl.load(step + 2) + 5 * k
        if is_on(flags_ptr, tl.load(term + 4)):
            weight = weight_of(pointers_ptr, tl.load(step + 3), tl.load(term)).to(tl.float32)
            scale = vector(slab_ptr, tl.load(term + 1), valid, 1.0)
            out = tl.load(term + 3)
            tl.store(slab_ptr + out + channel, scale * weight, mask=(valid >= 0) & (out >= 0))
            constant += vector(slab_ptr, tl.load(term + 2), valid, 0.0) * weight
    at = tl.load(step + 4)
    tl.store(slab_ptr + at + channel, constant, mask=(valid >= 0) & (at >= 0))


@triton.jit
def accumulate(pointers_ptr, number, logical, value, there):
    """Add to a gradient tensor, where there is one."""
    pointer = tensor_at(pointers_ptr, tl.maximum(number, 0), tl.float32) + logical
    before = tl.load(pointer, mask=there & (number >= 0), other=0.0)
    tl.store(pointer, before + value.to(tl.float32), mask=there & (number >= 0))


@triton.jit(do_not_specialize=["first", "images"])
def normalise_backward_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK: tl.constexpr,
):
    """Record: flag, vectors, elements, upstream (weight, sum_g, sum_gy, out, flag), decision, by_y, constant,
    starts, gamma, beta, segments, channels."""
    step = record_of(table_ptr, first)
    channels = tl.load(step + 13).to(tl.int32)
    if (is_on(flags_ptr, tl.load(step)) == 0) | (tl.program_id(0) * BLOCK >= channels):
        return
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    valid = tl.where(inside, channel, -1)
    vectors = tl.load(step + 1)
    mean = vector(slab_ptr, vectors, valid, 0.0).to(tl.float64)
    inverse = vector(slab_ptr, vectors + channels, valid, 0.0).to(tl.float64)
    scale = vector(slab_ptr, vectors + 2 * channels, valid, 0.0).to(tl.float64)
    total, product = tl.zeros((BLOCK,), dtype=tl.float64), tl.zeros((BLOCK,), dtype=tl.float64)
    reached = tl.load(step) * 0
    for k in range(tl.load(step + 3)):
        one = table_ptr + tl.load(step + 4) + 5 * k
        if is_on(flags_ptr, tl.load(one + 4)):
            weight = weight_of(pointers_ptr, tl.load(step + 5), tl.load(one))
            total += weight * sums_at(work_ptr, tl.load(one + 1), channel, inside)
            product += weight * sums_at(work_ptr, tl.load(one + 2), channel, inside)
            reached += 1
            out = tl.load(one + 3)
            tl.store(slab_ptr + out + channel, (scale * weight).to(tl.float32), mask=inside & (out >= 0))
    # vectors of a normalisation that nothing reaches may be anything
    by_normalised = tl.where(reached > 0, inverse * (product - mean * total), 0.0)
    logical = logical_of(table_ptr, tl.load(step + 11), tl.load(step + 12), channel)
    gamma, beta = tl.load(step + 9), tl.load(step + 10)
    there = inside & (logical >= 0)
    accumulate(pointers_ptr, gamma, logical, by_normalised, there & (reached > 0))
    accumulate(pointers_ptr, beta, logical, total, there & (reached > 0))
    elements, at, other = tl.load(step + 2), tl.load(step + 6), tl.load(step + 7)
    if at >= 0:
        share = tl.where(elements > 0, 1.0 / tl.maximum(elements, 1).to(tl.float64), 0.0)
        by_y = tl.where(reached > 0, -scale * inverse * by_normalised * share, 0.0)
        constant = tl.where(reached > 0, -scale * total * share - by_y * mean, 0.0)
        before = inside & (tl.load(step + 8) == 0)
        by_y += tl.load(slab_ptr + at + channel, mask=before, other=0.0).to(tl.float64)
        constant += tl.load(slab_ptr + other + channel, mask=before, other=0.0).to(tl.float64)
        tl.store(slab_ptr + at + channel, by_y.to(tl.float32), mask=inside)
        tl.store(slab_ptr + other + channel, constant.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["first", "images"])
def decision_gradient_kernel(
    slab_ptr,
    work_ptr,
    table_ptr,
    flags_ptr,
    pointers_ptr,
    first,
    images,
    BLOCK: tl.constexpr,
):
    """Record: flag, weight, sum_g, sum_gy, scale, shift, channels, tensor."""
    step = record_of(table_ptr, first)
    if is_on(flags_ptr, tl.load(step)) == 0:
        return
    channels = tl.load(step + 6).to(tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for begin in range(0, channels, BLOCK):
        channel = begin + tl.arange(0, BLOCK)
        inside = channel < channels
        valid = tl.where(inside, channel, -1)
        scale = vector(slab_ptr, tl.load(step + 4), valid, 1.0).to(tl.float64)
        total += scale * sums_at(work_ptr, tl.load(step + 3), channel, inside)
        shift = vector(slab_ptr, tl.load(step + 5), valid, 0.0).to(tl.float64)
        total += shift * sums_at(work_ptr, tl.load(step + 2), channel, inside)
    amount = tl.sum(total)
    target = tensor_at(pointers_ptr, tl.load(step + 7), tl.float32) + tl.load(step + 1)
    before = tl.load(target)
    # all threads have read it before one writes it
    tl.debug_barrier()
    tl.store(target, before + amount.to(tl.float32))
