"""The gradients of a region's maps before they are steps.

The gradient of a map is a sum: what lies in its own buffer (convolutions and poolings add to it) and terms
that are never stored, coefficient * gradient of a map that summed it. BatchNorm turns the gradient g of its
output into a*g + b*y + c with per-channel vectors, so that its gradient is not stored either: whoever
computed y adds it up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from nascompile.compiler.region.flags import ALWAYS, NEVER, WITH_PARAMETERS, gradient_of_output
from nascompile.compiler.region.forward import Forward
from nascompile.compiler.region.ir import (
    Conv,
    Norm,
    Source,
    Sum,
    TensorRef,
    Value,
    Weight,
)
from nascompile.compiler.region.memory import Buffer, Place
from nascompile.compiler.region.packing import Rows, dense_packer
from nascompile.compiler.region.storage import ConvOf, TermOf
from nascompile.compiler.region.tasks import PACK, UNPACK, Summed, TaskList
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Load,
    Term,
    UnpackDense,
    UnpackDepthwise,
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients are asked for: of each input, of the parameters, of the decision."""

    inputs: tuple[bool, ...]
    parameters: bool
    decision: bool


@dataclass(eq=False, slots=True)
class Flow:
    """A gradient that reaches a value without being stored: coefficient * (gradient at `place`)."""

    place: Place
    coefficient: Buffer | None
    flag: int


@dataclass(eq=False, slots=True)
class Gradient:
    """The gradient of a map: flows, what is added into its buffer by `direct`, and a constant per channel."""

    flows: list[Flow] = field(default_factory=list)
    direct: list[Callable[[Place], None]] = field(default_factory=list)
    constant: Buffer | None = None
    by_y: Buffer | None = None
    flags: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Arrival:
    """A gradient of a normalisation's output, and its sums over the batch."""

    place: Place
    term: TermOf | None
    sum_g: int
    sum_gy: int
    flag: int


class Gradients:
    """The gradients of a region's maps, and the memory, numbers and tasks of its backward program.

    `tensors` are numbered anew: ("grad output", i), ("grad input", i), ("grad", ref).
    """

    def __init__(self, forward: Forward, wanted: Wanted) -> None:
        self.forward, self.wanted = forward, wanted
        self.graph, self.settings, self.flags = forward.graph, forward.settings, forward.flags
        self.tasks = TaskList()
        self.buffers: list[Buffer] = []
        self.tensors: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self.sums = 0
        self.gradients: dict[Rows, Buffer] = {}
        self._of: defaultdict[Value, Gradient] = defaultdict(Gradient)
        self._arrivals: defaultdict[Value, list[Arrival]] = defaultdict(list)
        self._staged_norms: defaultdict[Value, list[Callable[[Place, int, bool], None]]] = defaultdict(list)
        self._places: dict[Value, Place] = {}
        self._begun: set[Hashable] = set()
        self._transposed: dict[Rows, Buffer] = {}
        self.reached: dict[Hashable, int] = {}
        self.whole: frozenset[TensorRef] = frozenset()
        self._is_needed = self._needed(parameters=wanted.parameters)
        self._always_needed = self._needed(parameters=False)
        self._with_parameters = self.flags.chosen(WITH_PARAMETERS)

    def _needed(self, *, parameters: bool) -> set[Value]:
        """The values whose gradients lead to something that is asked for, parameters among it or not."""
        found: set[Value] = set()
        for value in self.graph.values:
            op = value.op
            needed = any(x in found for x in value.inputs)
            if isinstance(op, Source):
                needed = self.wanted.inputs[op.index]
            elif isinstance(op, Conv):
                needed |= parameters
            elif isinstance(op, Norm):
                has_weights = (op.gamma is not None or op.beta is not None) and not op.is_fixed
                needed |= parameters and has_weights
            elif isinstance(op, Sum):
                needed |= self.wanted.decision and any(info.weight is not None for info in op.terms)
            if needed:
                found.add(value)
        return found

    def _towards(self, value: Value, flag: int) -> int:
        """The flag of a gradient that arrives at a value: where that leads to parameters only, a run without
        their gradients leaves it out, and with it all that comes after."""
        return flag if value in self._always_needed else self.flags.all_of([flag, self._with_parameters])

    # ---- memory and numbers ----

    def tensor(self, what: Hashable) -> int:
        """The number of a tensor of the backward program."""
        if what not in self._numbers:
            self._numbers[what] = len(self.tensors)
            self.tensors.append(what)
        return self._numbers[what]

    def _vector(self, name: str, floats: int) -> Buffer:
        buffer = Buffer(name, floats, True)
        self.buffers.append(buffer)
        return buffer

    def _new_sums(self, count: int) -> int:
        self.sums += count
        return self.sums - count

    def _new_place(self, value: Value) -> Place:
        """A map of the size of the value, in the memory of the backward pass."""
        place = self.forward.new_map(value, f"g{value.number}")
        self.forward.buffers.remove(place.buffer)
        self.buffers.append(place.buffer)
        return place

    def _place(self, value: Value) -> Place:
        """The buffer of a map's gradient; the part of a concatenation's where the map is one."""
        if value not in self._places:
            part = self.forward.parts.get(value)
            if part is not None and part[0] in self._is_needed:
                whole = self._place(part[0])
                self._places[value] = whole.part(part[1], self.forward.place(value).channels)
            else:
                self._places[value] = self._new_place(value)
        return self._places[value]

    # ---- the gradient of a map ----

    def _load(self, index: int, value: Value) -> None:
        if value not in self._is_needed:
            return
        place, number = self._place(value), self.tensor(("grad output", index))
        strides, segments = self.settings.strides(value.shape), value.layout.segments
        adds = int(self._has_begun(place))
        self._begun.update(place.cells())
        # backward does not run without any gradient
        is_alone = len(self.graph.outputs) == 1
        flag = ALWAYS if is_alone else self.flags.chosen(gradient_of_output(index))
        self._of[value].flags.append(self._towards(value, flag))
        self.tasks.step(
            "load gradient",
            value,
            lambda _: Load(number, *strides, segments, place.map(), adds),
            writes=place.cells(),
        )

    def _has_begun(self, place: Place) -> bool:
        return all(cell in self._begun for cell in place.cells())

    def _flag(self, value: Value) -> int:
        return self.flags.any_of(self._of[value].flags)

    def _stored_gradient(self, value: Value) -> Place | None:
        """The whole gradient of a map in its buffer; None where nothing reaches it."""
        gradient = self._of[value]
        flag = self._flag(value)
        if flag == NEVER:
            return None
        place = self._place(value)
        begun = self._has_begun(place)
        if gradient.flows or gradient.constant is not None or not begun:
            self._sum_up(value, gradient, place, flag, adds=begun)
        self._begun.update(place.cells())
        for direct in gradient.direct:
            direct(place)
        gradient.flows, gradient.direct, gradient.constant = [], [], None
        return place

    def _sum_up(self, value: Value, gradient: Gradient, place: Place, flag: int, *, adds: bool) -> None:
        flows, constant = list(gradient.flows), gradient.constant
        self.tasks.step(
            "gradient",
            value,
            lambda _: Combine(terms(flows), offset(constant), Activation.none, place.map(), int(adds), NONE),
            reads=read_by(flows, constant),
            writes=place.cells(),
            flag=flag,
        )

    def _expression(self, value: Value) -> tuple[list[Flow], Buffer | None, int]:
        """The gradient of a map as terms and a constant; its buffer is a term if anything adds to it."""
        gradient, flag = self._of[value], self._flag(value)
        part = self.forward.parts.get(value)
        inside = part is not None and part[0] in self._is_needed
        if flag == NEVER:
            return [], None, flag
        flows, constant = list(gradient.flows), gradient.constant
        if gradient.direct or inside or value in self._places:
            gradient.flows, gradient.constant = [], None
            place = self._stored_gradient(value)
            assert place is not None
            flows.append(Flow(place, None, flag))
        return flows, constant, flag

    def _weight_slots(self, value: Value, one: ConvOf, flag: int) -> tuple[Buffer | None, Buffer | None]:
        """Where the chunks add up the gradients of the weights."""
        found: list[Buffer | None] = []
        inputs, outputs = one.staged.source.channels, self.forward.place(value).channels
        for part, size in ((one.depthwise, inputs), (one.dense, inputs * outputs)):
            if part is None or not self.wanted.parameters:
                found.append(None)
                continue
            self._reach(part.weight, self.flags.all_of([flag, self._with_parameters]))
            if part.rows not in self.gradients:
                count = part.kernel[0] * part.kernel[1]
                self.gradients[part.rows] = Buffer("gradient", count * size, False)
            found.append(self.gradients[part.rows])
        return found[0], found[1]

    def _pack_transposed(self, value: Value, one: ConvOf, part: Conv) -> Buffer:
        """The weights of a dense part as its input's gradient needs them."""
        if part.rows not in self._transposed:
            sizes = one.staged.source.channels, self.forward.place(value).channels
            target = Buffer(
                "transposed weights", part.kernel[0] * part.kernel[1] * sizes[0] * sizes[1], False
            )
            self.buffers.append(target)
            self._transposed[part.rows] = target
            make = dense_packer(part, self.tensor(part.weight), sizes, one.source, value)
            flag = self.forward.pack_flag(part.rows)
            self.tasks.barrier(PACK, value, lambda: make(NONE, target.offset, flag), (), (target,), flag)
        return self._transposed[part.rows]

    def _reach(self, ref: Hashable, flag: int) -> None:
        self.reached[ref] = self.flags.any_of([flag, self.reached.get(ref, NEVER)])

    def _reach_decision(self, weight: Weight, flag: int) -> None:
        self._reach(("decision", weight.key, weight.of_mean), flag)

    def _unpack(self) -> None:
        """From the chunks' sums to the gradient tensors of the weights."""
        done: set[Rows] = set()
        written: defaultdict[TensorRef, int] = defaultdict(int)
        for value, one in self.forward.convs.items():
            for part in (one.depthwise, one.dense):
                if part is None or part.rows in done or part.rows not in self.gradients:
                    continue
                done.add(part.rows)
                self._unpack_one(value, one, part)
                written[part.weight] += elements(value, one, part)
        self.whole = frozenset(ref for ref, count in written.items() if count == ref.value.numel())

    def _unpack_one(self, value: Value, one: ConvOf, part: Conv) -> None:
        at, flag = self.gradients[part.rows], self.reached[part.weight]
        count, number = part.kernel[0] * part.kernel[1], self.tensor(("grad", part.weight))
        inputs, outputs = one.staged.source.channels, self.forward.place(value).channels
        read = one.source.layout.segments
        make: Any
        if part.is_depthwise:
            make = lambda: UnpackDepthwise(at.offset, count, read, inputs, number, flag=flag)  # noqa: E731
        else:
            written = value.layout.shifted(part.first)
            make = lambda: UnpackDense(  # noqa: E731
                at.offset, count, read, written, inputs, outputs, number, flag=flag
            )
        self.tasks.barrier(UNPACK, value, make, (Summed(at),), (), flag)

    def _slot(self, arrival: Arrival) -> int:
        weight = None if arrival.term is None else arrival.term.weight
        return NONE if weight is None else self.settings.slot(weight)


def elements(value: Value, one: ConvOf, part: Conv) -> int:
    """How many elements of a weight's gradient are written for one part of a convolution."""
    inputs = sum(count for _, count, _ in one.source.layout.segments)
    outputs = 1 if part.is_depthwise else sum(count for _, count, _ in value.layout.segments)
    return part.kernel[0] * part.kernel[1] * inputs * outputs


def offset(buffer: Buffer | None) -> int:
    """Where a buffer lies, NONE without one."""
    return NONE if buffer is None else buffer.offset


def terms(flows: list[Flow]) -> tuple[Term, ...]:
    """Flows as the terms of a step."""
    return tuple(Term(flow.place.map(), offset(flow.coefficient), flow.flag) for flow in flows)


def read_by(flows: list[Flow], constant: Buffer | None) -> tuple[Hashable, ...]:
    """What a step reads that sums flows and a constant."""
    cells = [cell for flow in flows for cell in flow.place.cells()]
    vectors = [flow.coefficient for flow in flows if flow.coefficient is not None]
    return (*cells, *vectors, *(() if constant is None else (constant,)))
