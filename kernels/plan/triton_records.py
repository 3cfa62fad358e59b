"""The table that the Triton kernels of plans read in device memory: records of maps, taps, terms and
operations."""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from nascompile.kernels.plan.steps import (
    NONE,
    Coefficients,
    DecisionGradient,
    Map,
    Normalise,
    NormaliseBackward,
    PackDense,
    PackDepthwise,
    Space,
    Tap,
    Term,
    UnpackDense,
    UnpackDepthwise,
)

Item = TypeVar("Item")


class Table:
    """Words of a program's table. In work memory gradients begin at `gradients`, the first image's scratch at
    `scratch`, each `scratch_image` floats after the one before."""

    def __init__(self, gradients: int, scratch: int, scratch_image: int) -> None:
        self.words: list[int] = []
        self.gradients, self.scratch, self.scratch_image = gradients, scratch, scratch_image

    def add(self, words: Iterable[int]) -> int:
        """Where these words lie in the table."""
        at = len(self.words)
        self.words.extend(int(word) for word in words)
        return at

    def map(self, place: Map) -> list[int]:
        """The words of a map."""
        image, offset = place.image, place.offset
        if place.space == Space.scratch:
            image, offset = self.scratch_image, offset + self.scratch
        return [
            *(int(place.space == Space.scratch), offset, image, place.row, place.pixel),
            *(place.channels, place.height, place.width),
        ]

    def terms(self, terms: Sequence[Term]) -> list[int]:
        """How many, and where they lie."""
        rows = [[*self.map(term.map), term.coefficient, term.flag] for term in terms]
        return self._rows(rows)

    def taps(self, taps: Sequence[Tap]) -> list[int]:
        """How many, and where they lie."""
        return self._rows([(tap.offset, tap.weight) for tap in taps])

    def segments(self, segments: Sequence[tuple[int, int, int]]) -> list[int]:
        """How many, and where they lie."""
        return self._rows(segments)

    def _rows(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return [len(rows), self.add(word for row in rows for word in row)]

    def barrier(self, op: Any) -> list[int]:
        """The record of a barrier operation."""
        return _RECORDS[type(op)](self, op)

    def _depthwise_weights(self, op: PackDepthwise | UnpackDepthwise) -> list[int]:
        at = op.target if isinstance(op, PackDepthwise) else self.gradients + op.source
        return [op.flag, op.tensor, op.count, *self.segments(op.segments), op.channels, at]

    def _dense_weights(self, op: PackDense | UnpackDense) -> list[int]:
        # every input channel of the tensor is in some segment
        inputs = max(first + count for first, count, _ in op.in_segments)
        words = [op.flag, op.tensor, op.count, *self.segments(op.in_segments)]
        words += [*self.segments(op.out_segments), op.in_channels, op.out_channels, inputs]
        if isinstance(op, PackDense):
            return [*words, op.target, op.transposed]
        return [*words, self.gradients + op.source, NONE]

    def _normalise(self, op: Normalise) -> list[int]:
        return [
            *(op.flag, op.moments, op.elements, _bits(op.epsilon), _bits(op.momentum), op.gamma, op.beta),
            *(op.running_mean, op.running_var, op.counter, *self.segments(op.segments)),
            *(op.channels, op.out),
        ]

    def _coefficients(self, op: Coefficients) -> list[int]:
        rows = self._rows([(t.weight, t.scale, t.shift, t.out, t.flag) for t in op.terms])
        return [op.flag, *rows, op.decision, op.constant, op.channels]

    def _normalise_backward(self, op: NormaliseBackward) -> list[int]:
        rows = self._rows([(u.weight, u.sum_g, u.sum_gy, u.out, u.flag) for u in op.upstream])
        return [
            *(op.flag, op.vectors, op.elements, *rows, op.decision, op.by_y, op.constant, op.starts),
            *(op.gamma, op.beta, *self.segments(op.segments), op.channels),
        ]

    def _decision_gradient(self, op: DecisionGradient) -> list[int]:
        return [op.flag, op.weight, op.sum_g, op.sum_gy, op.scale, op.shift, op.channels, op.tensor]


_RECORDS: dict[type, Callable[[Table, Any], list[int]]] = {
    PackDepthwise: Table._depthwise_weights,
    PackDense: Table._dense_weights,
    UnpackDepthwise: Table._depthwise_weights,
    UnpackDense: Table._dense_weights,
    Normalise: Table._normalise,
    Coefficients: Table._coefficients,
    NormaliseBackward: Table._normalise_backward,
    DecisionGradient: Table._decision_gradient,
}


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def written_by(op: Any) -> list[Hashable]:
    """The places that a barrier operation shares with others: they must be carried out one after another."""
    if isinstance(op, Normalise):
        tensors = (op.running_mean, op.running_var, op.counter)
        return [("tensor", number) for number in tensors if number != NONE]
    if isinstance(op, NormaliseBackward):
        places = [("tensor", number) for number in (op.gamma, op.beta) if number != NONE]
        return [*places, *(("slab", at) for at in (op.by_y, op.constant) if at != NONE)]
    if isinstance(op, DecisionGradient):
        return [(op.tensor, op.weight)]
    if isinstance(op, UnpackDepthwise | UnpackDense):
        return [op.tensor]
    return []


def rounds(items: Sequence[Item], places: Callable[[Item], Iterable[Hashable]]) -> list[list[Item]]:
    """The items in groups; those that share a place are in different ones, in their order."""
    found: list[list[Item]] = []
    free: dict[Hashable, int] = {}
    for item in items:
        keys = list(places(item))
        at = max((free.get(key, 0) for key in keys), default=0)
        if at == len(found):
            found.append([])
        found[at].append(item)
        free.update(dict.fromkeys(keys, at + 1))
    return found
