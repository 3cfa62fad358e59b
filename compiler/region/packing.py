"""The weights of a region as its kernels want them: packed once a run, only those that the decision needs."""

from __future__ import annotations

from typing import Any

from nascompile.compiler.region.flags import ALWAYS, Flags
from nascompile.compiler.region.ir import Conv, Graph, TensorRef, Value
from nascompile.compiler.region.layout import Segments
from nascompile.compiler.region.memory import Buffer
from nascompile.compiler.region.settings import Settings
from nascompile.compiler.region.storage import Storage
from nascompile.compiler.region.tasks import Task, TaskList
from nascompile.kernels.plan.steps import NONE, PackDense, PackDepthwise

Rows = tuple[TensorRef, int]
"""A weight, and the first of its rows that are used."""


class Packing(Storage):
    """Packs every weight once, however many convolutions use it."""

    def __init__(self, graph: Graph, settings: Settings, flags: Flags) -> None:
        super().__init__(graph, settings, flags)
        self.tasks = TaskList()
        self._packed: dict[Rows, tuple[Buffer | None, Buffer | None]] = {}
        self._packers: dict[Rows, list[Value]] = {}

    def _barrier(self, name: str, value: Value, make: Any, reads: Any, writes: Any, flag: int) -> None:
        self.tasks.add(Task(name, value, lambda _: make(), True, tuple(reads), tuple(writes), flag))

    def _pack_depthwise(self, op: Conv, channels: int, segments: Segments, value: Value) -> Buffer:
        count = op.kernel[0] * op.kernel[1]
        self._packers.setdefault(op.rows, []).append(value)
        known = self._packed.get(op.rows)
        if known is not None and known[0] is not None:
            return known[0]
        buffer, tensor = self.vector("depthwise weights", count * channels), self.tensor(op.weight)
        self._packed[op.rows] = (buffer, None)
        self._barrier(
            "pack",
            value,
            lambda: PackDepthwise(
                *(tensor, count, segments, channels, buffer.offset), flag=self._pack_flag(op.rows)
            ),
            (),
            (buffer,),
            ALWAYS,
        )
        return buffer

    def _pack_dense(
        self, op: Conv, inputs: int, outputs: int, source: Value, value: Value
    ) -> tuple[Buffer, Buffer | None]:
        self._packers.setdefault(op.rows, []).append(value)
        if op.rows in self._packed:
            return self._packed[op.rows]  # type: ignore[return-value]
        count = op.kernel[0] * op.kernel[1]
        size, tensor = count * inputs * outputs, self.tensor(op.weight)
        target = self.vector("weights", size)
        transposed = self.vector("transposed weights", size) if self.settings.has_backward else None
        segments = source.layout.segments, value.layout.shifted(op.first)
        self._packed[op.rows] = (target, transposed)
        self._barrier(
            "pack",
            value,
            lambda: PackDense(
                *(tensor, count, *segments, inputs, outputs),
                target.offset,
                NONE if transposed is None else transposed.offset,
                flag=self._pack_flag(op.rows),
            ),
            (),
            (target,) if transposed is None else (target, transposed),
            ALWAYS,
        )
        return target, transposed

    def _pack_flag(self, rows: Rows) -> int:
        return self.flags.any_of(self.flag(value) for value in self._packers[rows])
