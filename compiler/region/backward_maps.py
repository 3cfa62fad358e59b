"""The gradients of what moves, cuts, multiplies and pools images, and of activations."""

from __future__ import annotations

from nascompile.compiler.region.flags import NEVER
from nascompile.compiler.region.gradients import (
    Flow,
    Gradients,
    offset,
    read_by,
    terms,
)
from nascompile.compiler.region.ir import (
    PoolOp,
    Source,
    Value,
)
from nascompile.compiler.region.memory import Place
from nascompile.compiler.region.storage import (
    Stored,
    runs_of,
    starts_of,
    windows_of,
)
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    GateGradient,
    Mask,
    Pick,
    PoolBackward,
    Store,
    Term,
    Unstage,
)
from nascompile.kernels.plan.steps import Gate as GateStep


class MapGradients(Gradients):
    """The backward tasks of everything but sums, normalisations and convolutions."""

    def _cat(self, value: Value) -> None:
        place = self._stored_gradient(value)
        if place is None:
            return
        for part, first in zip(value.inputs, starts_of(value), strict=True):
            if part not in self._is_needed:
                continue
            self._of[part].flags.append(self._flag(value))
            if self.forward.parts.get(part) != (value, first):
                channels = self.forward.place(part).channels
                self._of[part].flows.append(Flow(place.part(first, channels), None, self._flag(value)))

    def _source(self, value: Value, op: Source) -> None:
        place = self._stored_gradient(value)
        self.reached["input", op.index] = self._flag(value)
        if place is None:
            return
        number = self.tensor(("grad input", op.index))
        strides, segments = self.settings.strides(value.shape), value.layout.segments
        self.tasks.step(
            "store gradient of input",
            value,
            lambda _: Store(number, *strides, segments, place.map()),
            reads=place.cells(),
            flag=self._flag(value),
        )

    def _mask(self, value: Value, place: Place, activation: Activation, flag: int) -> None:
        out = self.forward.place(value)
        self.tasks.step(
            "mask",
            value,
            lambda _: Mask(place.map(), out.map(), activation),
            reads=out.cells(),
            writes=place.cells(),
            flag=flag,
        )

    def _unstage(self, value: Value, place: Place, stored: Stored, flag: int) -> None:
        """The gradient of what an activation was applied to, in place of its output's."""
        (term,) = stored.terms
        source, vectors = self.forward.place(term.value), (term.coefficient, stored.constant)
        self.tasks.step(
            "unstage",
            value,
            lambda _: Unstage(
                *(place.map(), source.map(), offset(vectors[0]), offset(vectors[1])),
                *(stored.activation, place.map(), 0, NONE),
            ),
            reads=(*source.cells(), *(vector for vector in vectors if vector is not None)),
            writes=place.cells(),
            flag=flag,
        )

    def _pick(self, value: Value) -> None:
        source, flag = value.inputs[0], self._flag(value)
        place = self._stored_gradient(value)
        if place is None:
            return

        picked = runs_of(value)

        def create(target: Place) -> None:
            self.tasks.step(
                "pick backward",
                value,
                lambda _: tuple(
                    Pick(place.map(), target.map(), at, 1, first, step, count, 1, flag=flag)
                    for first, step, at, count in picked
                ),
                reads=place.cells(),
                writes=target.cells(),
                flag=flag,
            )

        self._of[source].direct.append(create)
        self._of[source].flags.append(flag)

    def _cut(self, value: Value) -> None:
        source, flag, place = value.inputs[0], self._flag(value), self._stored_gradient(value)
        if place is None:
            return

        def create(target: Place) -> None:
            written, read = windows_of(value, target, place)
            self.tasks.step(
                "cut backward",
                value,
                lambda _: Combine(
                    (Term(read.map(), NONE, NONE),), NONE, Activation.none, written.map(), 1, NONE
                ),
                reads=place.cells(),
                writes=target.cells(),
                flag=flag,
            )

        self._of[source].direct.append(create)
        self._of[source].flags.append(flag)

    def _gate(self, value: Value) -> None:
        image, gate = value.inputs
        flag, place = self._flag(value), self._stored_gradient(value)
        if place is None:
            return
        is_single = gate.shape != image.shape
        for source, other in ((image, gate), (gate, image)):
            if source in self._is_needed:
                summed = is_single and source is gate
                self._gate_side(value, place, source, self.forward.place(other), flag, summed=summed)

    def _gate_side(
        self, value: Value, place: Place, source: Value, other: Place, flag: int, *, summed: bool
    ) -> None:
        """The gradient of one factor: the product's times the other, summed over pixels for a gate of one."""

        def create(target: Place) -> None:
            self.tasks.step(
                "gate backward",
                value,
                lambda _: (
                    GateGradient(place.map(), other.map(), target.map())
                    if summed
                    else GateStep(place.map(), other.map(), target.map(), 1, NONE)
                ),
                reads=(*place.cells(), *other.cells()),
                writes=target.cells(),
                flag=flag,
            )

        self._of[source].direct.append(create)
        self._of[source].flags.append(flag)

    def _pool(self, value: Value, op: PoolOp) -> None:
        source = value.inputs[0]
        flows, constant, flag = self._expression(value)
        if flag == NEVER or source not in self._is_needed:
            return
        y, index = self.forward.place(value), self.forward.indices.get(value)
        image = -(-y.height * y.width * y.channels // 4)

        def create(target: Place) -> None:
            self.tasks.step(
                "pool backward",
                value,
                lambda maps: PoolBackward(
                    *(terms(flows), offset(constant), maps["tile"], target.map(), int(op.is_max)),
                    *(*op.kernel, *op.stride, *op.padding, int(op.counts_padding)),
                    *((NONE, 0) if index is None else (index.offset, image)),
                ),
                reads=(*read_by(flows, constant), *(() if index is None else (index,))),
                writes=target.cells(),
                flag=flag,
                scratch=(("tile", y.channels, y.height, y.width, (0, 0)),),
            )

        self._of[source].direct.append(create)
        self._of[source].flags.append(flag)
