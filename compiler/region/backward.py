"""From the forward pass of a region to the tasks of its gradients."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from nascompile.compiler.region.backward_maps import MapGradients
from nascompile.compiler.region.convolutions import conv_fields
from nascompile.compiler.region.flags import ALWAYS, NEVER, WITHOUT_PARAMETERS
from nascompile.compiler.region.forward import Forward
from nascompile.compiler.region.gradients import (
    Arrival,
    Flow,
    Gradient,
    Wanted,
    offset,
    read_by,
    terms,
)
from nascompile.compiler.region.grids import grid_border, input_grids
from nascompile.compiler.region.ir import (
    Arrange,
    Cat,
    Channels,
    Conv,
    Crop,
    Gate,
    Norm,
    Pad,
    PoolOp,
    Source,
    Spread,
    Value,
)
from nascompile.compiler.region.memory import Buffer, Place
from nascompile.compiler.region.storage import (
    ConvOf,
    Stored,
    TermOf,
    scale_and_shift,
    segments_of,
)
from nascompile.compiler.region.tasks import Gather, Summed
from nascompile.kernels.plan.steps import (
    MASKS,
    NONE,
    Activation,
    ConvolveBackward,
    DecisionGradient,
    Map,
    NormaliseBackward,
    Reduce,
    Term,
    Upstream,
)


class Backward(MapGradients):
    """Builds the backward tasks, one value after another, the last first."""

    def __init__(self, forward: Forward, wanted: Wanted) -> None:
        super().__init__(forward, wanted)
        for index, value in enumerate(self.graph.outputs):
            self._load(index, value)
        for value in reversed(self.graph.values):
            self._lower(value)
        self._unpack()

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
        elif isinstance(op, Channels | Arrange | Spread):
            self._pick(value)
        elif isinstance(op, Crop | Pad) and not self.forward.is_read_in_place(value):
            self._cut(value)
        elif isinstance(op, Gate):
            self._gate(value)
        elif isinstance(op, Source):
            self._source(value, op)

    def _stored(self, value: Value, stored: Stored) -> None:
        """A sum hands its gradient on: to maps as flows, to normalisations with the sums over the batch."""
        place = self._stored_gradient(value)
        if place is None:
            return
        flag = self._flag(value)
        if stored.activation in MASKS:
            self._mask(value, place, stored.activation, flag)
        elif stored.activation != Activation.none:
            self._unstage(value, place, stored, flag)
        if self.wanted.decision:
            for weight, term_flag in self.forward.zeros.get(value, ()):
                self._reach_decision(weight, self.flags.all_of([flag, term_flag]))
        terms = [t for t in stored.terms if self._matters(t)]
        sums = self._reduce(value, place, terms, flag)
        for term in terms:
            term_flag = self.flags.all_of([flag, term.flag])
            if term.norm is None or is_fixed(term.norm):
                self._flow(term.value, place, term.coefficient, term_flag)
            else:
                arrives = self._towards(term.norm, term_flag)
                self._arrivals[term.norm].append(Arrival(place, term, sums[None], sums[term], arrives))
            if self.wanted.decision and term.weight is not None:
                self._decision(term, place.channels, sums, term_flag)

    def _flow(self, value: Value, place: Place, coefficient: Buffer | None, flag: int) -> None:
        if value in self._is_needed:
            flow = Flow(place, coefficient, self._towards(value, flag))
            self._of[value].flows.append(flow)
            self._of[value].flags.append(flow.flag)

    def _matters(self, term: TermOf) -> bool:
        weighted = self.wanted.decision and term.weight is not None
        return weighted or (term.norm or term.value) in self._is_needed

    def _reduce(self, value: Value, place: Place, terms: list[TermOf], flag: int) -> dict[TermOf | None, int]:
        """Sums over the batch of gradient * map, for the terms that need them; under None that of the
        gradient."""
        summed = [t for t in terms if has_sums(t) or (self.wanted.decision and t.weight is not None)]
        sums: dict[TermOf | None, int] = {t: self._new_sums(place.channels) for t in summed}
        if not summed:
            return sums
        if any(t.norm is not None for t in summed):
            sums[None] = self._new_sums(place.channels)
        flags = {t: self.flags.all_of([flag, t.flag]) for t in summed}
        for term in summed:
            if term.norm is not None and (term.weight is None or not self.wanted.decision):
                flags[term] = self._towards(term.norm, flags[term])
        self.tasks.step(
            "reduce",
            value,
            lambda _: Reduce(
                place.map(),
                tuple(Term(self.forward.place(t.value).map(), sums[t], flags[t]) for t in summed),
                sums.get(None, NONE),
            ),
            reads=(*place.cells(), *(cell for t in summed for cell in self.forward.place(t.value).cells())),
            writes=tuple(Summed(at) for at in sums.values()),
            flag=flag,
        )
        return sums

    def _decision(self, term: TermOf, channels: int, sums: dict[TermOf | None, int], flag: int) -> None:
        assert term.weight is not None
        slot, number = self.settings.slot(term.weight), self.tensor("grad decision")
        self._reach_decision(term.weight, flag)
        vectors = None if term.norm is None else self.forward.vectors[term.norm]
        total = NONE if term.norm is None else sums[None]

        def make() -> DecisionGradient:
            scale, shift = scale_and_shift(vectors, channels)
            return DecisionGradient(slot, total, sums[term], scale, shift, channels, number, flag=flag)

        reads = [Summed(sums[term])]
        if total != NONE:
            reads.append(Summed(total))
        self.tasks.barrier("decision gradient", term.value, make, reads, (), flag)

    def _norm(self, value: Value, op: Norm) -> None:
        """dy = a*g + b*y + c for every gradient g of the normalisation's output."""
        source = value.inputs[0]
        y = self.forward.place(source)
        self._staged_norm(value, y)
        arrivals = self._arrivals[value]
        flag = self.flags.any_of(a.flag for a in arrivals)
        if flag == NEVER:
            return
        refs = (op.gamma, op.beta) if self.wanted.parameters and not op.is_fixed else (None, None)
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
        segments = segments_of(value)
        shared = gradient.by_y if op.by_batch and outs and outs[0] is not None else None
        constant = gradient.constant if shared is not None else None

        def make() -> NormaliseBackward:
            upstream = tuple(
                Upstream(self._slot(a), a.sum_g, a.sum_gy, offset(out), a.flag)
                for a, out in zip(arrivals, outs, strict=True)
            )
            return NormaliseBackward(
                *(vectors.offset, elements, upstream, decision, offset(shared), offset(constant)),
                *(int(starts), *numbers, segments, channels),
                # what several share is set even where one of them takes no part
                flag=ALWAYS if shared is not None else flag,
            )

        written = [b for b in (*outs, shared, constant) if b is not None]
        sums = [Summed(at) for a in arrivals for at in (a.sum_g, a.sum_gy)]
        self.tasks.barrier("normalise backward", value, make, sums, written, flag)

    def _staged_norm(self, value: Value, y: Place) -> None:
        """The gradient of a normalisation that convolutions read: stored, and summed over the batch on the
        way."""
        waiting = self._staged_norms.pop(value, [])
        flag = self._flag(value)
        if not waiting or flag == NEVER:
            return
        place = self._new_place(value)
        at = self._new_sums(2 * y.channels)
        if len(waiting) > 1:
            self._sum_up(value, Gradient(), place, flag, adds=False)
        for create in waiting:
            create(place, at, len(waiting) > 1)
        self._arrivals[value].append(Arrival(place, None, at, at + y.channels, flag))

    def _conv(self, value: Value, one: ConvOf) -> None:
        flows, constant, flag = self._expression(value)
        if flag == NEVER:
            return
        read = one.staged_norm or one.source
        wants_input = read in self._is_needed
        depthwise, dense = self._weight_slots(value, one, flag)
        if not wants_input and depthwise is None and dense is None:
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

    def _conv_step(
        self,
        value: Value,
        one: ConvOf,
        flows: list[Flow],
        constant: Buffer | None,
        flag: int,
        gather: Gather | None,
        slots: tuple[Buffer | None, Buffer | None],
    ) -> None:
        y = self.forward.place(value)
        part = one.taps_of
        inner = one.staged.source.channels if one.depthwise is not None else y.channels
        size = (one.staged.source.height, one.staged.source.width)
        border = grid_border(part, one.crop, size, (y.height, y.width))

        transposed = None
        if one.dense is not None and (gather is not None or slots[0] is not None):
            transposed = self._pack_transposed(value, one, one.dense)

        def make(maps: dict[str, Map], slots: Sequence[Buffer | None] = slots) -> ConvolveBackward:
            x, padded, dx = maps["x"], maps["padded"], maps.get("dx", maps["padded"])
            wants = gather is not None
            return ConvolveBackward(
                **conv_fields(one, x),
                y_height=y.height,
                y_width=y.width,
                y_channels=y.channels,
                weights_transposed=offset(transposed),
                terms=terms(flows),
                constant=offset(constant),
                padded=padded,
                grids=input_grids(part, one.crop, size, padded) if wants else (),
                dx=dx,
                needs_input=int(wants),
                adds=1,
                depthwise_gradient=offset(slots[0]),
                gradient=offset(slots[1]),
            )

        staged = one.staged
        packed = [b for b in (one.depthwise_weights, transposed) if b is not None]
        written: tuple[Hashable, ...] = tuple(Summed(slot) for slot in slots if slot is not None)
        if gather is not None:
            written += gather.target.cells()
            if gather.moments != NONE:
                half = gather.moments + staged.source.channels
                written += (Summed(gather.moments), Summed(half))
        has_weights = slots != (None, None)
        full = self.flags.all_of([flag, self._with_parameters]) if has_weights else flag
        light = self.flags.all_of([flag, self.flags.chosen(WITHOUT_PARAMETERS)])
        is_one = not self.settings.executor.in_turn

        def make_both(maps: dict[str, Map]) -> tuple[ConvolveBackward, ...]:
            """With the gradients of the weights, or without: the run says which."""
            first = replace(make(maps), flag=full)
            if is_one and has_weights:
                # there two steps that write one place would take turns, even where one of them is off
                return (replace(first, flag=flag, gradient_flag=full),)
            return (first, replace(make(maps, (None, None)), flag=light)) if has_weights else (first,)

        self.tasks.step(
            "convolve backward",
            value,
            make if gather is None else make_both,
            reads=(
                *staged.source.cells(),
                *packed,
                *(() if staged.vectors is None else (staged.vectors,)),
                *read_by(flows, constant),
            ),
            writes=written,
            flag=full if gather is None else flag,
            staged=staged,
            gather=gather,
            scratch=(("padded", inner, y.height, y.width, border),),
        )


def is_fixed(norm: Value) -> bool:
    """Whether a normalisation only multiplies by and adds constants."""
    return isinstance(norm.op, Norm) and norm.op.is_fixed


def has_sums(term: TermOf) -> bool:
    """Whether the gradient of a term's normalisation needs sums over the batch."""
    return term.norm is not None and not is_fixed(term.norm)
