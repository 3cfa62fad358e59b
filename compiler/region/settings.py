"""What a plan is made for: the batch, the mode, the instruction set; and the borders that its images need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nascompile.compiler.region.executors import Executor
from nascompile.compiler.region.ir import Conv, Graph, Shape, Weight


@dataclass(slots=True)
class Settings:
    """executor, device: who runs it, and where. images: samples; chunks: threads; lane: channels are padded
    to a multiple of it.

    channels_last: the memory format of inputs and outputs. borders: by (padded channels, height, width), the
    zeros that convolutions read around such an image; one border for all, so that they can share scratch
    memory. slots: the place of every weight in the decision tensor. without: names of rewrites (rewrites.py)
    that are left out.
    """

    executor: Executor
    device: torch.device
    images: int
    chunks: int
    lane: int
    channels_last: bool
    has_backward: bool
    borders: dict[tuple[int, int, int], tuple[int, int]]
    slots: dict[Weight, int]
    without: frozenset[str] = frozenset()

    def strides(self, shape: Shape) -> tuple[int, int, int, int]:
        """The strides of an input or output: of samples, channels, rows and columns, in elements."""
        channels, height, width = shape
        if self.channels_last:
            return channels * height * width, 1, width * channels, channels
        return channels * height * width, height * width, width, 1

    def border(self, channels: int, height: int, width: int) -> tuple[int, int]:
        """The zeros above and below, and left and right, of a staged image."""
        return self.borders.get((channels, height, width), (0, 0))

    def slot(self, weight: Weight) -> int:
        """The index of a weight in the decision tensor."""
        return self.slots[weight]


def read_borders(graph: Graph) -> dict[tuple[int, int, int], tuple[int, int]]:
    """The widest padding of the convolutions on images of each size."""
    borders: dict[tuple[int, int, int], tuple[int, int]] = {}
    for value in graph.values:
        if not isinstance(value.op, Conv):
            continue
        source = value.inputs[0]
        key = (source.layout.padded, *source.shape[1:])
        before = borders.get(key, (0, 0))
        borders[key] = (max(before[0], value.op.padding[0]), max(before[1], value.op.padding[1]))
    return borders
