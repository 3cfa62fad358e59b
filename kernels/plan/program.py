"""A program: phases of barrier operations and steps, and how it is written down for the C++ executor."""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels.plan.steps import BARRIERS, STEPS, Barrier, Step

VERSION = 1
ALIGNMENT = 16
"""Floats: every part of a chunk's work memory, and every map, begins at a multiple of it."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Barrier operations, once; then the steps for every image."""

    barriers: tuple[Barrier, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """What `run` carries out.

    images: samples in the batch; chunks: threads they are shared out among; lane: channels are padded to a multiple
    of it. sums (fp64), gradients and scratch (fp32): sizes of a chunk's work memory.
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
        return self.chunks * sum(aligned(part) for part in parts)


def aligned(count: int) -> int:
    """`count` floats rounded up to a whole number of alignments."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def encode(program: Program) -> Tensor:
    """The program as an int64 tensor; csrc/plan.h says how to read it.

    Header: version, images, chunks, lane, sums, gradients, scratch, number of phases, position of the first. A phase
    is (number of barriers, position of their positions, number of steps, position of theirs). An operation is its
    kind (index in BARRIERS or STEPS), its flag, then its fields in order: a float as the bits of a double, a structure
    as its fields, a tuple as its length and the position of its items, which lie one after another.
    """
    words: list[int] = [0] * 9
    table = []
    for phase in program.phases:
        barriers = [_operation(words, op, BARRIERS) for op in phase.barriers]
        steps = [_operation(words, op, STEPS) for op in phase.steps]
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


def _operation(words: list[int], op: Any, kinds: tuple[type, ...]) -> int:
    own = [kinds.index(type(op)), op.flag]
    for field in fields(op):
        if field.name != "flag":
            own.extend(_value(words, getattr(op, field.name)))
    return _append(words, own)


def _value(words: list[int], value: Any) -> list[int]:
    if isinstance(value, int):
        return [int(value)]
    if isinstance(value, float):
        return [struct.unpack("<q", struct.pack("<d", value))[0]]
    if dataclasses.is_dataclass(value):
        return [word for field in fields(value) for word in _value(words, getattr(value, field.name))]
    assert isinstance(value, tuple), value
    items = [word for item in value for word in _item(words, item)]
    return [len(value), _append(words, items)]


def _item(words: list[int], item: Any) -> list[int]:
    if isinstance(item, tuple):
        return [int(word) for word in item]
    return _value(words, item)
