"""A program: phases of barrier operations and steps, and how it is written down for the C++ executor."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels.plan.steps import BARRIERS, STEPS, Barrier, Map, Step, Tap

VERSION = 2
_BARRIERS = {kind: number for number, kind in enumerate(BARRIERS)}
_STEPS = {kind: number for number, kind in enumerate(STEPS)}
ALIGNMENT = 16
"""Floats: every part of a chunk's work memory, and every map, begins at a multiple of it."""
GAP = 4096 + 7 * ALIGNMENT
"""Floats between the work memory of two chunks: prefetchers of one thread would take from the other what it
is about to write. No whole number of pages, or what is added up of several chunks would meet in the cache."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Barrier operations, once; then the steps for every image."""

    barriers: tuple[Barrier, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """What `run` carries out.

    images: samples in the batch; chunks: threads they are shared out among; lane: channels are padded to a
    multiple of it. sums (fp64), gradients and scratch (fp32): sizes of a chunk's work memory.
    """

    phases: tuple[Phase, ...]
    images: int
    chunks: int
    lane: int
    sums: int
    gradients: int
    scratch: int

    @property
    def work(self) -> int:
        """Floats of work memory that `run` needs."""
        parts = (2 * self.sums, self.gradients, self.scratch)
        floats = sum(aligned(part) for part in parts)
        return self.chunks * (floats + GAP) if floats else 0


def aligned(count: int) -> int:
    """`count` floats rounded up to a whole number of alignments."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def encode(program: Program) -> Tensor:
    """The program as an int64 tensor; csrc/plan.h says how to read it.

    Header: version, images, chunks, lane, sums, gradients, scratch, number of phases, position of the first.
    A phase is (number of barriers, position of their positions, number of steps, position of theirs). An
    operation is its kind (index in BARRIERS or STEPS), its flag, then its fields in order: a float as the
    bits of a double, a structure as its fields, a tuple as its length and the position of its items, which
    lie one after another.
    """
    words: list[int] = [0] * 9
    table = []
    for phase in program.phases:
        barriers = [_operation(words, op, _BARRIERS) for op in phase.barriers]
        steps = [_operation(words, op, _STEPS) for op in phase.steps]
        table.append((len(barriers), _append(words, barriers), len(steps), _append(words, steps)))
    at = _append(words, [word for row in table for word in row])
    words[:9] = (
        *(VERSION, program.images, program.chunks, program.lane),
        *(program.sums, program.gradients, program.scratch, len(table), at),
    )
    return torch.tensor(words, dtype=torch.int64)


def _append(words: list[int], more: list[int]) -> int:
    at = len(words)
    words.extend(more)
    return at


def _operation(words: list[int], op: Any, kinds: dict[type, int]) -> int:
    own = [kinds[type(op)], op.flag]
    for name in _names(type(op)):
        if name not in ("flag", "gradient_flag"):
            _write(words, own, getattr(op, name))
    return _append(words, own)


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _write(words: list[int], own: list[int], value: Any) -> None:
    """Add a value to the words of an operation; the items of a tuple go into the program right away."""
    if isinstance(value, int):
        own.append(value)
    elif isinstance(value, Map):
        own += (value.space, value.offset, value.image, value.row, value.pixel)
        own += (value.channels, value.height, value.width)
    elif isinstance(value, tuple):
        items: list[int] = []
        for item in value:
            if isinstance(item, Tap):
                items += (item.offset, item.weight)
            elif isinstance(item, tuple):
                items += item
            else:
                _write(words, items, item)
        own += (len(value), _append(words, items))
    elif isinstance(value, float):
        own += struct.unpack("<q", struct.pack("<d", value))
    else:
        for name in _names(type(value)):
            _write(words, own, getattr(value, name))
