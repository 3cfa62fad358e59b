"""What the reference works on: views of the slab, of scratch, and the sums of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels.plan.program import Program, aligned
from nascompile.kernels.plan.steps import Map, Space


class State:
    """The memory of one run. One chunk's sums and gradients stand for all chunks; scratch has one part an
    image."""

    def __init__(self, program: Program, slab: Tensor, flags: Tensor, tensors: Sequence[Tensor]) -> None:
        self.program = program
        self.slab = slab
        self.tensors = list(tensors)
        self.sums = torch.zeros(program.sums, dtype=torch.float64)
        self.gradients = slab.new_zeros(program.gradients)
        self.scratch_size = aligned(program.scratch)
        self.scratch = slab.new_zeros(program.images * self.scratch_size)
        self._flags = flags.tolist()
        self._bytes: dict[int, Tensor] = {}

    def holds(self, flag: int) -> bool:
        """Whether what carries this flag takes part."""
        return flag < 0 or bool(self._flags[flag])

    def memory(self, space: Space, image: int) -> tuple[Tensor, int]:
        """The memory of a map, and the floats from one image to the next."""
        return (self.slab, image) if space == Space.slab else (self.scratch, self.scratch_size)

    def view(self, place: Map) -> Tensor:
        """A map as (images, height, width, channels)."""
        memory, image = self.memory(place.space, place.image)
        size = (self.program.images, place.height, place.width, place.channels)
        strides = (image, place.row, place.pixel, 1)
        return memory.as_strided(size, strides, memory.storage_offset() + place.offset)

    def vector(self, offset: int, length: int) -> Tensor:
        """A per-channel vector of the slab."""
        return self.slab[offset : offset + length]

    def matrix(self, offset: int, rows: int, columns: int) -> Tensor:
        """Weights in the slab."""
        return self.slab[offset : offset + rows * columns].view(rows, columns)

    def bytes(self, step: Any, shape: Sequence[int]) -> Tensor:
        """The indices of a maximum pooling, dense for every image."""
        raw = self.slab.view(torch.uint8)
        _, height, width, channels = shape
        width_of_float = self.slab.element_size()
        size = (self.program.images, height, width, channels)
        strides = (width_of_float * step.index_image, width * channels, channels, 1)
        return raw.as_strided(size, strides, raw.storage_offset() + width_of_float * step.index)
