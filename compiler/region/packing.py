"""The weights of a region as its kernels want them: packed once a run, only those that the decision needs."""

from __future__ import annotations

from collections.abc import Callable

from nascompile.compiler.region.flags import ALWAYS, Flags
from nascompile.compiler.region.ir import Conv, Graph, TensorRef, Value
from nascompile.compiler.region.layout import Segments
from nascompile.compiler.region.memory import Buffer
from nascompile.compiler.region.settings import Settings
from nascompile.compiler.region.storage import Storage
from nascompile.compiler.region.tasks import PACK, TaskList
from nascompile.kernels.plan.steps import NONE, PackDense, PackDepthwise

Rows = tuple[TensorRef, int]
"""A weight, and the first of its rows that are used."""


class Packing(Storage):
    """Packs every weight once, however many convolutions use it."""

    def __init__(self, graph: Graph, settings: Settings, flags: Flags) -> None:
        super().__init__(graph, settings, flags)
        self.tasks = TaskList()
        self._packed: dict[Rows, Buffer] = {}
        self._packers: dict[Rows, list[Value]] = {}

    def _pack_depthwise(self, op: Conv, channels: int, segments: Segments, value: Value) -> Buffer:
        count = op.kernel[0] * op.kernel[1]
        self._packers.setdefault(op.rows, []).append(value)
        if op.rows in self._packed:
            return self._packed[op.rows]
        buffer, tensor = self.vector("depthwise weights", count * channels), self.tensor(op.weight)
        self._packed[op.rows] = buffer
        self.tasks.barrier(
            "pack depthwise",
            value,
            lambda: PackDepthwise(
                *(tensor, count, segments, channels, buffer.offset), flag=self.pack_flag(op.rows)
            ),
            (),
            (buffer,),
            ALWAYS,
        )
        return buffer

    def _pack_dense(self, op: Conv, inputs: int, outputs: int, source: Value, value: Value) -> Buffer:
        self._packers.setdefault(op.rows, []).append(value)
        if op.rows in self._packed:
            return self._packed[op.rows]
        target = Buffer("weights", op.kernel[0] * op.kernel[1] * inputs * outputs, False)
        self.buffers.append(target)
        self._packed[op.rows] = target
        make = dense_packer(op, self.tensor(op.weight), (inputs, outputs), source, value)
        self.tasks.barrier(
            PACK,
            value,
            lambda: make(target.offset, NONE, self.pack_flag(op.rows)),
            (),
            (target,),
            ALWAYS,
        )
        return target

    def pack_flag(self, rows: Rows) -> int:
        return self.flags.any_of(self.flag(value) for value in self._packers[rows])


def dense_packer(
    op: Conv, tensor: int, sizes: tuple[int, int], source: Value, value: Value
) -> Callable[[int, int, int], PackDense]:
    """Makes the operation that packs a weight, from its target, the target of the transposed weight, and its
    flag. `sizes`: padded channels of input and output."""
    count, segments = op.kernel[0] * op.kernel[1], value.layout.shifted(op.first)
    fields = (tensor, count, source.layout.segments, segments, *sizes)
    return lambda target, transposed, flag: PackDense(*fields, target, transposed, flag=flag)
