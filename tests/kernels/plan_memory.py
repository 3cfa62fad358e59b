"""Memory to run hand-built programs in: a slab of nan, maps and vectors in it, and views of them in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from nascompile.kernels import native
from nascompile.kernels.plan.program import Phase, Program, aligned, encode
from nascompile.kernels.plan.run import lane, run
from nascompile.kernels.plan.steps import Map, Space, Step

SLAB = 1 << 19
SIZES = ((1, 1), (5, 7), (13, 3), (20, 17))
"""Heights and widths of the images that steps are tried on."""


@pytest.fixture(params=["DEFAULT", "AVX2", "AVX512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that is built in and that this processor has."""
    module, reason = native.load()
    if module is None:
        pytest.skip(str(reason))
    before = module.selected_instruction_set()
    try:
        module.select_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.select_instruction_set(before)


def empty(count: int) -> Tensor:
    """`count` floats of nan, aligned to 64 bytes."""
    memory = torch.full((count + 16,), torch.nan)
    start = -memory.data_ptr() % 64 // 4
    return memory[start : start + count]


class Memory:
    """A slab whose parts are given out one after another, for `images` images and `chunks` chunks."""

    def __init__(self, images: int = 3, chunks: int = 2) -> None:
        self.images = images
        self.chunks = chunks
        self.lane = lane()
        self.slab = empty(SLAB)
        self.used = 0
        self.scratch = 0
        self.sums = 0
        self.gradients = 0
        self.flags: list[int] = []
        self.tensors: list[Tensor] = []
        self.work = empty(0)

    def take(self, floats: int) -> int:
        """The offset of a fresh part of the slab."""
        offset = self.used
        self.used += aligned(floats)
        assert self.used <= SLAB
        return offset

    def map(
        self, channels: int, size: tuple[int, int], *, pixel: int = 0, margin: int = 0, scratch: bool = False
    ) -> Map:
        """A map; in pixels of `pixel` floats where that is more, with `margin` pixels around it."""
        height, width = size
        padded = -(-channels // self.lane) * self.lane
        pixel = max(pixel, padded)
        row = (width + 2 * margin) * pixel
        image = (height + 2 * margin) * row
        inner = margin * (row + pixel)
        if scratch:
            offset = self.scratch + inner
            self.scratch += aligned(image)
            return Map(Space.scratch, offset, 0, row, pixel, padded, height, width)
        return Map(
            Space.slab, self.take(self.images * image) + inner, image, row, pixel, padded, height, width
        )

    def view(self, map: Map) -> Tensor:
        """A map of the slab as a tensor (images, channels, height, width)."""
        assert map.space == Space.slab
        return self.slab.as_strided(
            (self.images, map.channels, map.height, map.width),
            (map.image, 1, map.row, map.pixel),
            self.slab.storage_offset() + map.offset,
        )

    def filled(self, channels: int, size: tuple[int, int], *, pixel: int = 0, margin: int = 0) -> Map:
        """A map of random numbers."""
        map = self.map(channels, size, pixel=pixel, margin=margin)
        self.view(map).copy_(torch.randn(self.view(map).shape))
        return map

    def vector(self, values: Tensor) -> int:
        """The offset of a per-channel vector with these values."""
        offset = self.take(len(values))
        self.slab[offset : offset + len(values)] = values
        return offset

    def random(self, channels: int) -> int:
        """The offset of a random per-channel vector."""
        return self.vector(torch.randn(channels))

    def read(self, offset: int, count: int) -> Tensor:
        """`count` floats of the slab."""
        return self.slab[offset : offset + count]

    def flag(self, value: int) -> int:
        """The index of a new flag."""
        self.flags.append(value)
        return len(self.flags) - 1

    def tensor(self, tensor: Tensor) -> int:
        """The number of a new tensor."""
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def summed(self, channels: int) -> int:
        """The offset of new sums."""
        self.sums += channels
        return self.sums - channels

    def program(self, *phases: Phase) -> Program:
        """A program over this memory."""
        return Program(phases, self.images, self.chunks, self.lane, self.sums, self.gradients, self.scratch)

    def run(self, *phases: Phase) -> None:
        """Carry out the phases."""
        program = self.program(*phases)
        self.work = empty(program.work)
        flags = torch.tensor(self.flags, dtype=torch.uint8)
        run(program, encode(program), self.slab, self.work, flags, self.tensors)

    def run_steps(self, *steps: Step) -> None:
        """Carry out the steps as one phase."""
        self.run(Phase((), steps))

    def read_sums(self, offset: int, count: int) -> Tensor:
        """Sums of the last run, over all chunks, in fp64."""
        size = self.work.numel() // self.chunks
        total = torch.zeros(count, dtype=torch.float64)
        for chunk in range(self.chunks):
            start = chunk * size + 2 * offset
            total += self.work[start : start + 2 * count].view(torch.float64)
        return total


def strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Those of a tensor (images, channels, height, width)."""
    n, c, h, w = tensor.stride()
    return n, c, h, w


def spread(vector: Tensor) -> Tensor:
    """A per-channel vector that multiplies (images, channels, height, width)."""
    return vector[:, None, None]


def same(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Assert that two tensors are equal but for the rounding of fp32, relative to the largest number."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    scale = max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def indexed(counts: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """(channel of the tensor, padded channel) for all channels of segments."""
    for logical, count, padded in counts:
        yield from ((logical + k, padded + k) for k in range(count))
