"""What the reference works on: views of the slab, of scratch, and the sums of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels.plan.program import Program, aligned
from nascompile.kernels.plan.steps import Map, Space


class Sums:
    """The sums over the batch, per channel, in fp64.

    Those of products, weight * value, are kept as sums of weight * (value - middle) and of weight. The middle
    is the mean of the value that is first added: where the mean is much larger than the deviation, a
    BatchNorm needs the digits that a plain sum of products or squares loses.
    """

    def __init__(self, length: int) -> None:
        self._sums = torch.zeros(length, dtype=torch.float64)
        self._middles = torch.zeros(length, dtype=torch.float64)
        self._weights = torch.zeros(length, dtype=torch.float64)
        self._begun = torch.zeros(length, dtype=torch.bool)

    @property
    def plain(self) -> Tensor:
        """All sums, as steps.py defines them."""
        return self._sums + self._middles * self._weights

    def add(self, at: int, value: Tensor) -> None:
        """Add what `total` reads: sums over (images, height, width) of a value with channels last."""
        self._sums[at : at + value.shape[-1]] += value.double().sum((0, 1, 2))

    def add_squares(self, at: int, value: Tensor) -> None:
        """Add what `variance` reads."""
        centred = self._centred(at, value)
        self.add(at, centred.square())
        # the square of a value is (value - middle)^2 + middle * (value + value - middle)
        self._weights[at : at + value.shape[-1]] += (centred + value).sum((0, 1, 2))

    def add_products(self, at: int, weight: Tensor, value: Tensor) -> None:
        """Add what `products` reads."""
        self.add(at, weight.double() * self._centred(at, value))
        self._weights[at : at + value.shape[-1]] += weight.double().sum((0, 1, 2))

    def total(self, at: int, channels: int) -> Tensor:
        """The sums of values."""
        return self._sums[at : at + channels]

    def variance(self, at: int, mean: Tensor, elements: int) -> Tensor:
        """The biased variance of so many values, whose mean is given and whose squares were added."""
        off = mean - self._middles[at : at + len(mean)]
        return (self.total(at, len(mean)) / elements - off.square()).clamp_min(0)

    def products(self, at: int, about: Tensor) -> Tensor:
        """The sums of weight * (value - about)."""
        channels = slice(at, at + len(about))
        return self._sums[channels] + (self._middles[channels] - about) * self._weights[channels]

    def _centred(self, at: int, value: Tensor) -> Tensor:
        """The value less the middle."""
        channels = slice(at, at + value.shape[-1])
        # zero where there is no mean, so that infinities stay what they are
        mean = value.double().mean((0, 1, 2)).nan_to_num(0, 0, 0)
        self._middles[channels] = torch.where(self._begun[channels], self._middles[channels], mean)
        self._begun[channels] = True
        return value.double() - self._middles[channels]


class State:
    """The memory of one run. One chunk's sums and gradients stand for all chunks; scratch has one part an
    image."""

    def __init__(self, program: Program, slab: Tensor, flags: Tensor, tensors: Sequence[Tensor]) -> None:
        self.program = program
        self.slab = slab
        self.tensors = list(tensors)
        self.sums = Sums(program.sums)
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
