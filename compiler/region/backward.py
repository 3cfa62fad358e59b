"""From the forward pass of a region to the tasks of its gradients.

The gradient of a map is a sum: what lies in its own buffer (convolutions and poolings add to it) and terms that are
never stored, coefficient * gradient of a map that summed it. BatchNorm turns the gradient g of its output into
a*g + b*y + c with per-channel vectors, so that its gradient is not stored either: whoever computed y adds it up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from nascompile.compiler.region.flags import ALWAYS, NEVER
from nascompile.compiler.region.forward import ConvOf, Forward, Stored, TermOf, conv_fields
from nascompile.compiler.region.grids import grid_border, input_grids
from nascompile.compiler.region.ir import (
    Cat,
    Conv,
    Norm,
    PoolOp,
    Source,
    Sum,
    TensorRef,
    Value,
)
from nascompile.compiler.region.memory import Buffer, Place
from nascompile.compiler.region.tasks import Gather, Summed, Task, TaskList
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    ConvolveBackward,
    DecisionGradient,
    Load,
    Map,
    Mask,
    NormaliseBackward,
    PoolBackward,
    Reduce,
    Store,
    Term,
    UnpackDense,
    UnpackDepthwise,
    Upstream,
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


class Backward:
    """Builds the backward tasks. `tensors` are numbered anew: ("grad output", i), ("grad input", i), ("grad", ref)."""

    def __init__(self, forward: Forward, wanted: Wanted) -> None:
        self.forward, self.wanted = forward, wanted
        self.graph, self.settings, self.flags = forward.graph, forward.settings, forward.flags
        self.tasks = TaskList()
        self.buffers: list[Buffer] = []
        self.tensors: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self.sums = self.gradients = 0
        self._of: defaultdict[Value, Gradient] = defaultdict(Gradient)
        self._arrivals: defaultdict[Value, list[Arrival]] = defaultdict(list)
        self._staged_norms: defaultdict[Value, list[Callable[[Place, int, bool], None]]] = defaultdict(list)
        self._places: dict[Value, Place] = {}
        self._begun: set[Hashable] = set()
        self._slots: dict[TensorRef, list[tuple[int, int]]] = {}
        self.reached: dict[Hashable, int] = {}
        self._is_needed = self._needed()
        for index, value in enumerate(self.graph.outputs):
            self._load(index, value)
        for value in reversed(self.graph.values):
            self._lower(value)
        self._unpack()

    def _needed(self) -> set[Value]:
        """The values whose gradients lead to something that is asked for."""
        found: set[Value] = set()
        for value in self.graph.values:
            op = value.op
            needed = any(x in found for x in value.inputs)
            if isinstance(op, Source):
                needed = self.wanted.inputs[op.index]
            elif isinstance(op, Conv):
                needed |= self.wanted.parameters
            elif isinstance(op, Norm):
                needed |= self.wanted.parameters and (op.gamma is not None or op.beta is not None)
            elif isinstance(op, Sum):
                needed |= self.wanted.decision and any(info.weight is not None for info in op.terms)
            if needed:
                found.add(value)
        return found

    # ---- memory and numbers --------------------------------------------------------------------------------------

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

    def _place(self, value: Value) -> Place:
        """The buffer of a map's gradient; the part of a concatenation's where the map is one."""
        if value not in self._places:
            part = self.forward._parts.get(value)
            if part is not None and part[0] in self._is_needed:
                whole = self._place(part[0])
                self._places[value] = whole.part(part[1], self.forward.place(value).channels)
            else:
                place = self.forward.new_map(value, f"g{value.number}")
                self.forward.buffers.remove(place.buffer)
                self.buffers.append(place.buffer)
                self._places[value] = place
        return self._places[value]

    def _step(self, name: str, make: Any, **more: Any) -> None:
        self.tasks.add(
            Task(
                name,
                make,
                False,
                more.pop("reads", ()),
                more.pop("writes", ()),
                more.pop("flag", ALWAYS),
                **more,
            )
        )

    def _barrier(self, name: str, make: Any, reads: Any, writes: Any, flag: int) -> None:
        self.tasks.add(Task(name, lambda _: make(), True, tuple(reads), tuple(writes), flag))

    # ---- the gradient of a map -------------------------------------------------------------------------------------

    def _load(self, index: int, value: Value) -> None:
        if value not in self._is_needed:
            return
        place, number = self._place(value), self.tensor(("grad output", index))
        strides, segments = self.settings.strides(value.shape), self.forward.segments(value)
        adds = int(self._has_begun(place))
        self._begun.update(place.cells())
        self._of[value].flags.append(ALWAYS)
        self._step(
            f"load gradient {index}",
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
            self._sum_up(f"gradient {value.number}", gradient, place, flag, adds=begun)
        self._begun.update(place.cells())
        for direct in gradient.direct:
            direct(place)
        gradient.flows, gradient.direct, gradient.constant = [], [], None
        return place

    def _sum_up(self, name: str, gradient: Gradient, place: Place, flag: int, *, adds: bool) -> None:
        flows, constant = list(gradient.flows), gradient.constant
        self._step(
            name,
            lambda _: Combine(
                _terms(flows), _offset(constant), Activation.none, place.map(), int(adds), NONE
            ),
            reads=_read_by(flows, constant),
            writes=place.cells(),
            flag=flag,
        )

    def _expression(self, value: Value) -> tuple[list[Flow], Buffer | None, int]:
        """The gradient of a map as terms and a constant, of which its buffer is one if anything adds to it."""
        gradient, flag = self._of[value], self._flag(value)
        part = self.forward._parts.get(value)
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

    # ---- one value after another, the last first -------------------------------------------------------------------

    def _lower(self, value: Value) -> None:
        if value not in self._is_needed:
            return
        op = value.op
        if value in self.forward.stored:
            self._stored(value, self.forward.stored[value])
        if isinstance(op, Norm):
            self._norm(value, op)
        elif isinstance(op, Cat):
            self._cat(value)
        elif isinstance(op, Conv) and value in self.forward.convs:
            self._conv(value, self.forward.convs[value])
        elif isinstance(op, PoolOp):
            self._pool(value, op)
        elif isinstance(op, Source):
            self._source(value, op)

    def _cat(self, value: Value) -> None:
        place = self._stored_gradient(value)
        if place is None:
            return
        for part, (_, _, first) in zip(value.inputs, self.forward.segments(value), strict=True):
            if part not in self._is_needed:
                continue
            self._of[part].flags.append(self._flag(value))
            if self.forward._parts.get(part) != (value, first):
                channels = self.forward.place(part).channels
                self._of[part].flows.append(Flow(place.part(first, channels), None, self._flag(value)))

    def _source(self, value: Value, op: Source) -> None:
        place = self._stored_gradient(value)
        self.reached["input", op.index] = self._flag(value)
        if place is None:
            return
        number = self.tensor(("grad input", op.index))
        strides, segments = self.settings.strides(value.shape), self.forward.segments(value)
        self._step(
            f"store gradient of input {op.index}",
            lambda _: Store(number, *strides, segments, place.map()),
            reads=place.cells(),
            flag=self._flag(value),
        )

    def _stored(self, value: Value, stored: Stored) -> None:
        """A sum hands its gradient on: to maps as flows, to normalisations with the sums over the batch."""
        place = self._stored_gradient(value)
        if place is None:
            return
        flag = self._flag(value)
        if stored.activation != Activation.none:
            out = self.forward.place(value)
            self._step(
                f"mask {value.number}",
                lambda _: Mask(place.map(), out.map(), stored.activation),
                reads=out.cells(),
                writes=place.cells(),
                flag=flag,
            )
        terms = [t for t in stored.terms if self._matters(t)]
        sums = self._reduce(value, place, terms, flag)
        for term in terms:
            term_flag = self.flags.all_of([flag, term.flag])
            if term.norm is not None:
                self._arrivals[term.norm].append(Arrival(place, term, sums[None], sums[term], term_flag))
            elif term.value in self._is_needed:
                self._of[term.value].flows.append(Flow(place, term.coefficient, term_flag))
                self._of[term.value].flags.append(term_flag)
            if self.wanted.decision and term.weight is not None:
                self._decision(term, place.channels, sums, term_flag)

    def _matters(self, term: TermOf) -> bool:
        weighted = self.wanted.decision and term.weight is not None
        return weighted or (term.norm or term.value) in self._is_needed

    def _reduce(self, value: Value, place: Place, terms: list[TermOf], flag: int) -> dict[TermOf | None, int]:
        """Sums over the batch of gradient * map, for the terms that need them; under None that of the gradient."""
        summed = [t for t in terms if t.norm is not None or (self.wanted.decision and t.weight is not None)]
        sums: dict[TermOf | None, int] = {t: self._new_sums(place.channels) for t in summed}
        if not summed:
            return sums
        if any(t.norm is not None for t in summed):
            sums[None] = self._new_sums(place.channels)
        flags = {t: self.flags.all_of([flag, t.flag]) for t in summed}
        self._step(
            f"reduce {value.number}",
            lambda _: Reduce(
                place.map(),
                tuple(Term(self.forward.place(t.value).map(), sums[t], flags[t]) for t in summed),
                sums.get(None, NONE),
            ),
            reads=(*place.cells(), *(cell for t in summed for cell in self.forward.place(t.value).cells())),
            writes=tuple(Summed("sums", at) for at in sums.values()),
            flag=flag,
        )
        return sums

    def _decision(self, term: TermOf, channels: int, sums: dict[TermOf | None, int], flag: int) -> None:
        assert term.weight is not None
        slot, number = self.settings.slot(term.weight), self.tensor("grad decision")
        vectors = None if term.norm is None else self.forward.vectors[term.norm]
        total = NONE if term.norm is None else sums[None]

        def make() -> DecisionGradient:
            at = NONE if vectors is None else vectors.offset
            scale, shift = (NONE, NONE) if at == NONE else (at + 2 * channels, at + 3 * channels)
            return DecisionGradient(slot, total, sums[term], scale, shift, channels, number, flag=flag)

        reads = [Summed("sums", sums[term])]
        if total != NONE:
            reads.append(Summed("sums", total))
        self._barrier("decision gradient", make, reads, (), flag)

    def _norm(self, value: Value, op: Norm) -> None:
        """dy = a*g + b*y + c for every gradient g of the normalisation's output."""
        source = value.inputs[0]
        y = self.forward.place(source)
        self._staged_norm(value, y)
        arrivals = self._arrivals[value]
        flag = self.flags.any_of(a.flag for a in arrivals)
        if flag == NEVER:
            return
        refs = (op.gamma, op.beta) if self.wanted.parameters else (None, None)
        for ref in refs:
            if ref is not None:
                self._reach(ref, flag)
        gamma, beta = (NONE if ref is None else self.tensor(("grad", ref)) for ref in refs)
        gradient, wants = self._of[source], source in self._is_needed
        outs = [self._vector("gradient coefficient", y.channels) if wants else None for _ in arrivals]
        starts = True
        if wants and op.by_batch:
            starts = gradient.constant is None
            if gradient.constant is None:
                gradient.constant = self._vector("gradient constant", y.channels)
                gradient.by_y = self._vector("gradient by y", y.channels)
                # one flow for all normalisations of y; their flags decide whether it is read
                gradient.flows.append(Flow(y, gradient.by_y, ALWAYS))
        self._norm_barrier(value, op, arrivals, outs, (gamma, beta), flag, starts)
        for arrival, out in zip(arrivals, outs, strict=True):
            if wants:
                gradient.flows.append(Flow(arrival.place, out, arrival.flag))
                gradient.flags.append(arrival.flag)

    def _norm_barrier(
        self,
        value: Value,
        op: Norm,
        arrivals: list[Arrival],
        outs: list[Buffer | None],
        numbers: tuple[int, int],
        flag: int,
        starts: bool,
    ) -> None:
        source = value.inputs[0]
        gradient, channels = self._of[source], self.forward.place(source).channels
        vectors, weighted = self.forward.vectors[value], any(a.term and a.term.weight for a in arrivals)
        decision = self.tensor("decision") if weighted else NONE
        elements = self.settings.images * value.shape[1] * value.shape[2] if op.by_batch else 0
        segments = ((op.first, value.channels, 0),)
        shared = gradient.by_y if op.by_batch and outs and outs[0] is not None else None
        constant = gradient.constant if shared is not None else None

        def make() -> NormaliseBackward:
            upstream = tuple(
                Upstream(self._slot(a), a.sum_g, a.sum_gy, _offset(out), a.flag)
                for a, out in zip(arrivals, outs, strict=True)
            )
            return NormaliseBackward(
                *(vectors.offset, elements, upstream, decision, _offset(shared), _offset(constant)),
                *(int(starts), *numbers, segments, channels),
                # what several share is set even where one of them takes no part
                flag=ALWAYS if shared is not None else flag,
            )

        written = [b for b in (*outs, shared, constant) if b is not None]
        sums = [Summed("sums", at) for a in arrivals for at in (a.sum_g, a.sum_gy)]
        self._barrier(f"normalise backward {value.number}", make, sums, written, flag)

    def _slot(self, arrival: Arrival) -> int:
        weight = None if arrival.term is None else arrival.term.weight
        return NONE if weight is None else self.settings.slot(weight)

    def _staged_norm(self, value: Value, y: Place) -> None:
        """The gradient of a normalisation that convolutions read: stored, and summed over the batch on the way."""
        waiting = self._staged_norms.pop(value, [])
        flag = self._flag(value)
        if not waiting or flag == NEVER:
            return
        place = self.forward.new_map(value, f"g{value.number}")
        self.forward.buffers.remove(place.buffer)
        self.buffers.append(place.buffer)
        at = self._new_sums(2 * y.channels)
        if len(waiting) > 1:
            self._sum_up(f"gradient {value.number}", Gradient(), place, flag, adds=False)
        for create in waiting:
            create(place, at, len(waiting) > 1)
        self._arrivals[value].append(Arrival(place, None, at, at + y.channels, flag))

    def _pool(self, value: Value, op: PoolOp) -> None:
        source = value.inputs[0]
        flows, constant, flag = self._expression(value)
        if flag == NEVER or source not in self._is_needed:
            return
        y, index = self.forward.place(value), self.forward.indices.get(value)
        image = -(-y.height * y.width * y.channels // 4)

        def create(target: Place) -> None:
            self._step(
                f"pool backward {value.number}",
                lambda maps: PoolBackward(
                    *(_terms(flows), _offset(constant), maps["tile"], target.map(), int(op.is_max)),
                    *(*op.kernel, *op.stride, *op.padding, int(op.counts_padding)),
                    *((NONE, 0) if index is None else (index.offset, image)),
                ),
                reads=(*_read_by(flows, constant), *(() if index is None else (index,))),
                writes=target.cells(),
                flag=flag,
                scratch=(("tile", y.channels, y.height, y.width, (0, 0)),),
            )

        self._of[source].direct.append(create)
        self._of[source].flags.append(flag)

    def _conv(self, value: Value, one: ConvOf) -> None:
        flows, constant, flag = self._expression(value)
        if flag == NEVER:
            return
        read = one.staged_norm or one.source
        wants_input = read in self._is_needed
        depthwise, dense = self._weight_slots(value, one, flag)
        if not wants_input and depthwise == dense == NONE:
            return

        def create(target: Place | None, moments: int, adds: bool) -> None:
            gather = None if target is None else Gather(target, adds, moments)
            self._conv_step(value, one, flows, constant, flag, gather, (depthwise, dense))

        if not wants_input:
            create(None, NONE, False)
        elif one.staged_norm is not None:
            self._staged_norms[read].append(create)
            self._of[read].flags.append(flag)
        else:
            self._of[read].direct.append(lambda target: create(target, NONE, True))
            self._of[read].flags.append(flag)

    def _weight_slots(self, value: Value, one: ConvOf, flag: int) -> tuple[int, int]:
        """Where the chunks add up the gradients of the weights."""
        found = []
        inputs, outputs = one.staged.source.channels, self.forward.place(value).channels
        for part, size in ((one.depthwise, inputs), (one.dense, inputs * outputs)):
            if part is None or not self.wanted.parameters:
                found.append(NONE)
                continue
            self._reach(part.weight, flag)
            if part.weight not in self._slots:
                count = part.kernel[0] * part.kernel[1]
                self._slots[part.weight] = [(self.gradients, value.number)]
                self.gradients += count * size
            found.append(self._slots[part.weight][0][0])
        return found[0], found[1]

    def _reach(self, ref: TensorRef, flag: int) -> None:
        self.reached[ref] = self.flags.any_of([flag, self.reached.get(ref, NEVER)])

    def _conv_step(
        self,
        value: Value,
        one: ConvOf,
        flows: list[Flow],
        constant: Buffer | None,
        flag: int,
        gather: Gather | None,
        slots: tuple[int, int],
    ) -> None:
        y = self.forward.place(value)
        part = one.taps_of
        inner = one.staged.source.channels if one.depthwise is not None else y.channels
        size = (one.staged.source.height, one.staged.source.width)
        border = grid_border(part, one.crop, size, (y.height, y.width))

        def make(maps: dict[str, Map]) -> ConvolveBackward:
            x, padded, dx = maps["x"], maps["padded"], maps.get("dx", maps["padded"])
            wants = gather is not None
            return ConvolveBackward(
                **conv_fields(one, x),
                y_height=y.height,
                y_width=y.width,
                y_channels=y.channels,
                weights_transposed=_offset(one.transposed),
                terms=_terms(flows),
                constant=_offset(constant),
                padded=padded,
                grids=input_grids(part, one.crop, size, padded) if wants else (),
                dx=dx,
                needs_input=int(wants),
                adds=1,
                depthwise_gradient=slots[0],
                gradient=slots[1],
            )

        staged = one.staged
        packed = [b for b in (one.depthwise_weights, one.transposed) if b is not None]
        written = tuple(Summed("gradients", at) for at in slots if at != NONE)
        if gather is not None:
            written += gather.target.cells()
            if gather.moments != NONE:
                half = gather.moments + staged.source.channels
                written += (Summed("sums", gather.moments), Summed("sums", half))
        self._step(
            f"convolve backward {value.number}",
            make,
            reads=(
                *staged.source.cells(),
                *packed,
                *(() if staged.vectors is None else (staged.vectors,)),
                *_read_by(flows, constant),
            ),
            writes=written,
            flag=flag,
            staged=staged,
            gather=gather,
            scratch=(("padded", inner, y.height, y.width, border),),
        )

    def _unpack(self) -> None:
        """From the chunks' sums to the gradient tensors of the weights."""
        done: set[TensorRef] = set()
        for value, one in self.forward.convs.items():
            for part in (one.depthwise, one.dense):
                if part is None or part.weight in done or part.weight not in self._slots:
                    continue
                done.add(part.weight)
                self._unpack_one(value, one, part)

    def _unpack_one(self, value: Value, one: ConvOf, part: Conv) -> None:
        at, flag = self._slots[part.weight][0][0], self.reached[part.weight]
        count, number = part.kernel[0] * part.kernel[1], self.tensor(("grad", part.weight))
        inputs, outputs = one.staged.source.channels, self.forward.place(value).channels
        read = self.forward.segments(one.source)
        make: Any
        if part.is_depthwise:
            make = lambda: UnpackDepthwise(at, count, read, inputs, number, flag=flag)  # noqa: E731
        else:
            written = self.forward.segments(value)
            make = lambda: UnpackDense(  # noqa: E731
                at, count, read, written, inputs, outputs, number, flag=flag
            )
        self._barrier("unpack", make, (Summed("gradients", at),), (), flag)


def _offset(buffer: Buffer | None) -> int:
    return NONE if buffer is None else buffer.offset


def _terms(flows: list[Flow]) -> tuple[Term, ...]:
    return tuple(Term(flow.place.map(), _offset(flow.coefficient), flow.flag) for flow in flows)


def _read_by(flows: list[Flow], constant: Buffer | None) -> tuple[Hashable, ...]:
    cells = [cell for flow in flows for cell in flow.place.cells()]
    vectors = [flow.coefficient for flow in flows if flow.coefficient is not None]
    return (*cells, *vectors, *(() if constant is None else (constant,)))
