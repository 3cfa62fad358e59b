"""What a backward run gives a gradient to, and the memory for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels.plan.program import aligned


@dataclass(frozen=True, slots=True)
class Reached:
    """parameters: the numbers of those with a gradient, first those that the program writes as a whole;
    groups: where in memory how many of them, in that order, have which shape; floats: of memory, the first
    `written` of which need not be zeros; inputs: for every input whether it has a gradient."""

    parameters: list[int]
    groups: list[tuple[int, int, torch.Size]]
    floats: int
    written: int
    inputs: list[bool]


def reached(
    shapes: Sequence[torch.Size], parameters: Sequence[bool], whole: Sequence[bool], inputs: Sequence[bool]
) -> Reached:
    """For parameters of these shapes, given which of them and of the inputs have a gradient, and which the
    program writes as a whole."""
    there = [k for k, has in enumerate(parameters) if has]
    numbers = sorted(there, key=lambda k: (not whole[k], shapes[k]))
    groups: list[tuple[int, int, torch.Size]] = []
    floats = written = 0
    for (is_whole, shape), members in groupby(numbers, key=lambda k: (whole[k], shapes[k])):
        count = len(list(members))
        # kernels are faster where tensors begin at multiples of a cache line
        groups.append((aligned(floats), count, shape))
        floats = aligned(floats) + count * shape.numel()
        written = floats if is_whole else written
    return Reached(numbers, groups, floats, written, list(inputs))


class GradientMemory:
    """The gradients of a step in one piece of memory: a thousand allocations cost more than the step's sums.

    The piece is used again as soon as nobody holds a gradient in it any more: a training loop that sets them
    to None gets the same pages in every step, where fresh ones cost a few percent of it.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._flat: Tensor | None = None
        self._lock = threading.Lock()

    def take(self, wanted: Reached, count: int, absent: Tensor) -> list[Tensor]:
        """Memory for those of `count` parameters that are reached, zeros unless it is written as a whole;
        `absent` for the others."""
        with self._lock:
            # taken out: two threads must not find the same piece free
            flat, self._flat = self._flat, None
        if flat is None or flat.numel() != wanted.floats or _is_held(flat):
            flat = torch.empty(wanted.floats, **self._options)
        found = self._spread(flat, wanted, count, absent)
        # torch itself keeps the memory of GPUs, as in Memory.lease
        self._flat = flat if flat.device.type == "cpu" else None
        return found

    def _spread(self, flat: Tensor, wanted: Reached, count: int, absent: Tensor) -> list[Tensor]:
        flat[wanted.written :].zero_()
        found = [absent] * count
        for number, piece in zip(wanted.parameters, _pieces(flat, wanted.groups), strict=True):
            found[number] = piece
        return found


def _pieces(flat: Tensor, groups: Sequence[tuple[int, int, torch.Size]]) -> Iterator[Tensor]:
    """Tensors in the memory of `flat`: those of one shape by one operation."""
    for start, count, shape in groups:
        yield from flat[start : start + count * shape.numel()].view(count, *shape).unbind()


def _is_held(flat: Tensor) -> bool:
    """Whether anyone else has a tensor in the memory of `flat`."""
    storage = flat.untyped_storage()
    # `flat` and `storage` themselves
    return torch._C._storage_Use_Count(storage._cdata) > 2
