"""The memory of a plan: buffers in the slab, when they live, and where they lie."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from nascompile.kernels.plan.program import ALIGNMENT, aligned
from nascompile.kernels.plan.steps import NONE, Map, Space

_STAGGER = 5 * ALIGNMENT
"""Floats between neighbouring maps: buffers that begin at equal places of a page evict one another from the
cache."""


@dataclass(eq=False, slots=True)
class Buffer:
    """Floats of the slab or of the chunks' gradients. `first` and `last` are the phases between which they
    are used; vectors live throughout."""

    name: str
    floats: int
    is_vector: bool
    first: int = 1 << 60
    last: int = -1
    offset: int = NONE
    is_map: bool = False
    image: int = NONE
    """From one image to the next, in floats, where that is more than the buffer's own size."""
    borders: list[int] = field(default_factory=list)
    """Where the parts of a concatenation begin, ascending from 0; empty for a buffer of one piece."""


@dataclass(frozen=True, slots=True)
class Place:
    """A map, its buffer not yet laid out; fields as in kernels.plan.steps.Map, `start` within the buffer."""

    buffer: Buffer
    start: int
    image: int
    row: int
    pixel: int
    channels: int
    height: int
    width: int

    def map(self) -> Map:
        """The map, once the buffer has an offset."""
        assert self.buffer.offset >= 0, f"{self.buffer.name} is not laid out"
        return Map(
            Space.slab,
            self.buffer.offset + self.start,
            *(self.image if self.buffer.image == NONE else self.buffer.image, self.row, self.pixel),
            *(self.channels, self.height, self.width),
        )

    def cells(self) -> tuple[tuple[Buffer, int], ...]:
        """The pieces of the buffer that the map covers; tasks depend on one another by them."""
        borders = self.buffer.borders or [0]
        end = self.start + self.channels
        return tuple(
            (self.buffer, index)
            for index, begin in enumerate(borders)
            if begin < end and (index + 1 == len(borders) or borders[index + 1] > self.start)
        )

    def window(self, top: int, left: int, steps: tuple[int, int], size: tuple[int, int]) -> Place:
        """Some of the pixels: every steps-th row and column from the first, `size` of them."""
        start = self.start + top * self.row + left * self.pixel
        row, pixel = steps[0] * self.row, steps[1] * self.pixel
        return replace(self, start=start, row=row, pixel=pixel, height=size[0], width=size[1])

    def part(self, first: int, channels: int) -> Place:
        """Some of the channels."""
        return replace(self, start=self.start + first, channels=channels)


def new_place(name: str, images: int, channels: int, height: int, width: int) -> Place:
    """A map with a buffer of its own, dense."""
    image = height * width * channels
    return Place(
        Buffer(name, images * image, False, is_map=True),
        0,
        image,
        width * channels,
        channels,
        channels,
        height,
        width,
    )


def lay_out(buffers: Iterable[Buffer]) -> int:
    """Give every buffer its offset; those that are never used at one time may share memory. Returns the
    floats."""
    buffers = list(buffers)
    top = 0
    for buffer in buffers:
        if buffer.is_vector:
            buffer.offset = top
            top += aligned(buffer.floats)
    free = _FreeList(top)
    ending: dict[int, list[Buffer]] = {}
    for buffer in sorted(
        (b for b in buffers if not b.is_vector and b.last >= 0), key=lambda b: (b.first, -b.floats)
    ):
        for phase in sorted(phase for phase in ending if phase < buffer.first):
            for old in ending.pop(phase):
                free.give(old.offset, _size(old))
        buffer.offset = free.take(_size(buffer))
        ending.setdefault(buffer.last, []).append(buffer)
    return free.top


def lay_out_images(buffers: Iterable[Buffer], images: int) -> int:
    """As `lay_out` where one phase is all there is and `first` and `last` count its steps: every image has
    memory of its own, in which maps that are never used at one time share. Returns the floats."""
    buffers = list(buffers)
    others = [buffer for buffer in buffers if not buffer.is_map]
    for buffer in others:
        buffer.is_vector = True
    vectors = lay_out(others)
    maps = [buffer for buffer in buffers if buffer.is_map]
    for buffer in maps:
        buffer.floats //= images
    size = aligned(lay_out(maps))
    for buffer in maps:
        buffer.floats *= images
        buffer.image = size
        buffer.offset += vectors
    return vectors + images * size


def _size(buffer: Buffer) -> int:
    return aligned(buffer.floats) + _STAGGER


class _FreeList:
    """Free blocks by offset; the smallest that fits is taken, and the memory grows where none does."""

    def __init__(self, start: int) -> None:
        self.top = start
        self._blocks: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        fitting = [(length, at) for at, length in self._blocks if length >= size]
        if not fitting:
            return self._grow(size)
        length, at = min(fitting)
        index = bisect.bisect_left(self._blocks, (at, length))
        if length == size:
            del self._blocks[index]
        else:
            self._blocks[index] = (at + size, length - size)
        return at

    def _grow(self, size: int) -> int:
        at = self.top
        if self._blocks and sum(self._blocks[-1]) == self.top:
            at = self._blocks.pop()[0]
        self.top = at + size
        return at

    def give(self, at: int, size: int) -> None:
        index = bisect.bisect_left(self._blocks, (at, size))
        if index < len(self._blocks) and at + size == self._blocks[index][0]:
            size += self._blocks.pop(index)[1]
        if index and sum(self._blocks[index - 1]) == at:
            before = self._blocks.pop(index - 1)
            at, size = before[0], before[1] + size
            index -= 1
        self._blocks.insert(index, (at, size))
