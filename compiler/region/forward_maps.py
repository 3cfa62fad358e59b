"""The forward tasks of what moves, cuts, multiplies and pools images."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from nascompile.compiler.region.ir import (
    Norm,
    Pad,
    PoolOp,
    Source,
    Value,
)
from nascompile.compiler.region.memory import Buffer, Place
from nascompile.compiler.region.packing import Packing
from nascompile.compiler.region.storage import (
    runs_of,
    starts_of,
    windows_of,
)
from nascompile.compiler.region.tasks import Summed
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Load,
    Pick,
    Pool,
    Store,
    Term,
)
from nascompile.kernels.plan.steps import Gate as GateStep


class MapTasks(Packing):
    """The forward tasks of everything but sums, normalisations and convolutions."""

    def _load(self, value: Value, op: Source) -> None:
        place, number = self.place(value), self.tensor(("input", op.index))
        strides, segments = self.settings.strides(value.shape), value.layout.segments
        self.tasks.step(
            "load input",
            value,
            lambda _: Load(number, *strides, segments, place.map(), 0),
            writes=place.cells(),
        )

    def _store(self, index: int, value: Value) -> None:
        place, number = self.place(value), self.tensor(("output", index))
        strides, segments = self.settings.strides(value.shape), value.layout.segments
        self.tasks.step(
            "store output",
            value,
            lambda _: Store(number, *strides, segments, place.map()),
            reads=place.cells(),
        )

    def _new_moments(self, value: Value, place: Place) -> tuple[int, tuple[Hashable, ...]]:
        """Sums for the statistics of a map, where a normalisation of its reads them."""
        if not any(isinstance(user.op, Norm) and user.op.by_batch for user in value.users):
            return NONE, ()
        at = self.moments[value] = self.new_sums(2 * place.channels)
        return at, (Summed(at),)

    def _pool(self, value: Value, op: PoolOp) -> None:
        source = value.inputs[0]
        x, y = self.place(source), self.place(value)
        moments, sums = self._new_moments(value, y)
        index: Buffer | None = None
        image = -(-y.height * y.width * y.channels // 4)
        if op.is_max and self.settings.has_backward:
            index = self.indices[value] = Buffer(f"index {value.number}", self.settings.images * image, False)
            self.buffers.append(index)
        self.tasks.step(
            "pool",
            value,
            lambda _: Pool(
                *(
                    x.map(),
                    y.map(),
                    int(op.is_max),
                    *op.kernel,
                    *op.stride,
                    *op.padding,
                    int(op.counts_padding),
                ),
                *((NONE, 0) if index is None else (index.offset, image)),
                moments,
            ),
            reads=x.cells(),
            writes=(*y.cells(), *(() if index is None else (index,)), *sums),
            flag=self.flag(value),
        )

    def _pick(self, value: Value) -> None:
        source, flag = value.inputs[0], self.flag(value)
        x, y, picked = self.place(source), self.place(value), runs_of(value)

        def make(_: Any) -> tuple[Pick, ...]:
            # the first clears what none of them writes
            return tuple(
                Pick(x.map(), y.map(), first, step, to, 1, count, int(number > 0), flag=flag)
                for number, (first, step, to, count) in enumerate(picked)
            )

        self.tasks.step("pick", value, make, reads=x.cells(), writes=y.cells(), flag=flag)

    def _cut(self, value: Value) -> None:
        """Copy a crop, or an image into the middle of a larger one."""
        source, flag = value.inputs[0], self.flag(value)
        x, y = self.place(source), self.place(value)
        read, written = windows_of(value, x, y)

        def make(_: Any) -> tuple[Combine, ...]:
            terms = (Term(read.map(), NONE, NONE),)
            copy = Combine(terms, NONE, Activation.none, written.map(), 0, NONE, flag=flag)
            clear = Combine((), NONE, Activation.none, y.map(), 0, NONE, flag=flag)
            return (clear, copy) if isinstance(value.op, Pad) else (copy,)

        self.tasks.step("cut", value, make, reads=x.cells(), writes=y.cells(), flag=flag)

    def _gate(self, value: Value) -> None:
        image, gate = (self.place(x) for x in value.inputs)
        place = self.place(value)
        moments, sums = self._new_moments(value, place)
        self.tasks.step(
            "gate",
            value,
            lambda _: GateStep(image.map(), gate.map(), place.map(), 0, moments),
            reads=(*image.cells(), *gate.cells()),
            writes=(*place.cells(), *sums),
            flag=self.flag(value),
        )

    def _moments_of(self, source: Value) -> int:
        """The sums of a map, made by whoever wrote it; of an input by a step of its own."""
        if source not in self.moments:
            place = self.place(source)
            at = self.moments[source] = self.new_sums(2 * place.channels)
            self.tasks.step(
                "sum",
                source,
                lambda _: Combine(
                    (Term(place.map(), NONE, NONE),), NONE, Activation.none, place.map(), 0, at
                ),
                reads=place.cells(),
                writes=(*place.cells(), Summed(at)),
                flag=self.flag(source),
            )
        return self.moments[source]

    def _concatenate(self, value: Value) -> None:
        whole = self.place(value)
        for part, first in zip(value.inputs, starts_of(value), strict=True):
            if self.parts.get(part) == (value, first):
                continue
            source, target = self.place(part), whole.part(first, part.layout.padded)
            self.tasks.step(
                "copy",
                value,
                lambda _, s=source, t=target: Combine(
                    (Term(s.map(), NONE, NONE),), NONE, Activation.none, t.map(), 0, NONE
                ),
                reads=source.cells(),
                writes=target.cells(),
                flag=self.flag(value),
            )
