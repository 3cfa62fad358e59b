"""What all kernels of plans in Triton have in common: how a launch finds its record, and a record its maps.

A launch works on a list of records, one per index of the grid's last axis. A record is a row of int64 in a
table in device memory (triton_table.py writes it), so that a kernel is compiled for a few block sizes and not
for every step. Kernels read the flags themselves: a captured graph serves every decision.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAP = tl.constexpr(8)
"""Words of a map: in work memory or not, offset, image, row, pixel, channels, height, width."""
TERM = tl.constexpr(10)
"""Words of a term: its map, coefficient, flag."""


@triton.jit
def record_of(table_ptr, first):
    """The record of this program: `first` is where the list of the launch's records begins."""
    return table_ptr + tl.load(table_ptr + first + tl.program_id(2))


@triton.jit
def is_on(flags_ptr, flag):
    """Whether what carries this flag takes part."""
    return tl.load(flags_ptr + flag, mask=flag >= 0, other=1) != 0


@triton.jit
def size_of(map_ptr, images):
    """The pixels of all images of a map."""
    return (images * tl.load(map_ptr + 6) * tl.load(map_ptr + 7)).to(tl.int32)


@triton.jit
def pixels_of(map_ptr, images, tile, BLOCK_P: tl.constexpr):
    """Image, row and column of the pixels of a tile, and which of them exist."""
    height = tl.load(map_ptr + 6).to(tl.int32)
    width = tl.load(map_ptr + 7).to(tl.int32)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < images * height * width
    line = pixel // width
    return line // height, line % height, pixel % width, inside


@triton.jit
def base_of(slab_ptr, work_ptr, map_ptr, n, y, x):
    """Where these pixels of a map begin, in floats from slab_ptr."""
    # both are multiples of 64 bytes; one base pointer saves a branch at every access
    away = (work_ptr.to(tl.int64) - slab_ptr.to(tl.int64)) // 4
    start = tl.load(map_ptr) * away + tl.load(map_ptr + 1)
    row = tl.load(map_ptr + 3).to(tl.int32)
    pixel = tl.load(map_ptr + 4).to(tl.int32)
    base = start + n.to(tl.int64) * tl.load(map_ptr + 2) + (y * row + x * pixel)
    return tl.multiple_of(base, 16)


@triton.jit
def channels_of(BLOCK_C: tl.constexpr):
    """The channels of this program."""
    return tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def read(slab_ptr, base, channel, inside):
    """Values of pixels and channels; zero outside."""
    return tl.load(slab_ptr + base[:, None] + channel[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def write(slab_ptr, base, channel, value, inside):
    """Store values of pixels and channels."""
    tl.store(slab_ptr + base[:, None] + channel[None, :], value, mask=inside[:, None])


@triton.jit
def vector(slab_ptr, offset, channel, missing):
    """Part of a per-channel vector; `missing` where there is none."""
    offset = tl.multiple_of(offset, 16)
    return tl.load(slab_ptr + offset + channel, mask=(offset >= 0) & (channel >= 0), other=missing)


@triton.jit
def as_double(word):
    """The double that a word holds."""
    return word.to(tl.float64, bitcast=True)


@triton.jit
def tensor_at(pointers_ptr, number, KIND: tl.constexpr):
    """The pointer of a tensor of the program."""
    kind = tl.pointer_type(KIND)  # pyright: ignore[reportArgumentType]
    return tl.load(pointers_ptr + number).to(kind)


@triton.jit
def logical_of(table_ptr, count, at, channel):
    """The channels of a tensor that lie at padded channels; -1 for padding. Segments are (first, count,
    padded)."""
    found = channel * 0 - 1
    for k in range(count):
        segment = table_ptr + at + 3 * k
        padded = tl.load(segment + 2).to(tl.int32)
        here = (channel >= padded) & (channel < padded + tl.load(segment + 1).to(tl.int32))
        found = tl.where(here, channel - padded + tl.load(segment).to(tl.int32), found)
    return found
