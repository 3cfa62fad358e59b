"""From the values of a region to the tasks of its forward pass."""

from __future__ import annotations

from nascompile.compiler.region.convolutions import flops, make_convolve
from nascompile.compiler.region.flags import ALWAYS, Flags
from nascompile.compiler.region.forward_maps import MapTasks
from nascompile.compiler.region.ir import (
    Act,
    Arrange,
    Cat,
    Channels,
    Conv,
    Crop,
    Gate,
    Graph,
    Norm,
    Pad,
    PoolOp,
    Source,
    Spread,
    Sum,
    Unsupported,
    Value,
    Weight,
    Zero,
)
from nascompile.compiler.region.memory import Buffer
from nascompile.compiler.region.settings import Settings
from nascompile.compiler.region.storage import (
    ConvOf,
    Stored,
    TermOf,
    scale_and_shift,
    segments_of,
)
from nascompile.compiler.region.tasks import Staged, Summed
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Coefficients,
    Combine,
    Normalise,
    Term,
    Weighted,
)


class Forward(MapTasks):
    """Builds the forward tasks and keeps what the backward pass has to know."""

    def __init__(self, graph: Graph, settings: Settings, flags: Flags) -> None:
        super().__init__(graph, settings, flags)
        for value in graph.values:
            self._lower(value)
        for index, value in enumerate(graph.outputs):
            self._store(index, value)

    def _lower(self, value: Value) -> None:
        op = value.op
        if isinstance(op, Source):
            self._load(value, op)
        elif isinstance(op, Conv):
            if not self.is_fused_depthwise(value):
                self._convolve(value)
        elif isinstance(op, PoolOp):
            self._pool(value, op)
        elif isinstance(op, Norm):
            self._normalise(value, op)
            if not self.is_lazy_norm(value):
                self._combine(value)
        elif isinstance(op, Act):
            if not self.is_staged_act(value):
                self._combine(value)
        elif isinstance(op, Sum):
            if not self.is_merged_sum(value):
                self._combine(value)
        elif isinstance(op, Cat):
            self._concatenate(value)
        elif isinstance(op, Channels | Arrange | Spread):
            self._pick(value)
        elif isinstance(op, Crop | Pad):
            if not self.is_read_in_place(value):
                self._cut(value)
        elif isinstance(op, Gate):
            self._gate(value)
        elif isinstance(op, Zero) and any(not isinstance(user.op, Sum) for user in value.users):
            self._combine(value)

    def staged(
        self, value: Value, padding: tuple[int, int]
    ) -> tuple[Value, Staged, Value | None, tuple[int, int]]:
        """What a convolution that reads `value` really reads: the stored value, how, its normalisation, the
        crop."""
        crop, activation, norm = (0, 0), Activation.none, None
        if self.is_read_in_place(value):
            assert isinstance(value.op, Crop)
            crop, value = (value.op.top, value.op.left), value.inputs[0]
        if self.is_staged_act(value):
            assert isinstance(value.op, Act)
            activation, value = value.op.kind, value.inputs[0]
        if self.is_lazy_norm(value):
            norm, value = value, value.inputs[0]
        vectors = None if norm is None else self.vectors[norm]
        place = self.place(value)
        border = self.settings.border(place.channels, place.height, place.width)
        direct = norm is None and activation == Activation.none
        if direct and padding == (0, 0):
            border = (0, 0)
        return value, Staged(place, vectors, activation, border), norm, crop

    def _convolve(self, value: Value) -> None:
        op = value.op
        assert isinstance(op, Conv)
        below = value.inputs[0]
        depthwise = below.op if self.is_fused_depthwise(below) else None
        assert depthwise is None or isinstance(depthwise, Conv)
        read = below.inputs[0] if depthwise is not None else below
        source, staged, norm, crop = self.staged(read, (depthwise or op).padding)
        if op.is_depthwise:
            depthwise, dense = op, None
        else:
            dense = op
        one = ConvOf(value, source, staged, norm, crop, depthwise, dense, None, None)
        if depthwise is not None:
            one.depthwise_weights = self._pack_depthwise(
                depthwise, staged.source.channels, source.layout.segments, value
            )
        if dense is not None:
            outputs = value.layout.padded
            one.weights = self._pack_dense(dense, staged.source.channels, outputs, source, value)
        self.convs[value] = one
        place = self.place(value)
        moments, sums = self._new_moments(value, place)
        packed = [b for b in (one.depthwise_weights, one.weights) if b is not None]
        self.tasks.step(
            "convolve",
            value,
            lambda maps: make_convolve(one, maps["x"], place.map(), moments),
            reads=(*staged.source.cells(), *packed, *(() if staged.vectors is None else (staged.vectors,))),
            writes=(*place.cells(), *sums),
            flag=self.flag(value),
            staged=staged,
            work=flops(one),
        )

    def _normalise(self, value: Value, op: Norm) -> None:
        source = value.inputs[0]
        channels = self.place(source).channels
        out = self.vectors[value] = self.vector(f"norm {value.number}", 4 * channels)
        moments = self._moments_of(source) if op.by_batch else NONE
        elements = self.settings.images * source.shape[1] * source.shape[2]
        if op.by_batch and elements == 1:
            raise Unsupported("a BatchNorm has one value per channel to train with")
        segments = segments_of(value)
        tensors = (
            *(self.optional(op.gamma), self.optional(op.beta)),
            self.optional(op.running_mean) if op.updates or not op.by_batch else NONE,
            self.optional(op.running_var) if op.updates or not op.by_batch else NONE,
            self.optional(op.counter) if op.updates and op.first == 0 else NONE,
        )
        self.tasks.barrier(
            "normalise",
            value,
            lambda: Normalise(
                *(moments, elements, op.epsilon, op.momentum, *tensors, segments, channels, out.offset),
                flag=self.flag(value),
            ),
            () if moments == NONE else (Summed(moments),),
            # one after another where a module is called twice
            (out, ("running", op.running_mean)) if op.updates else (out,),
            self.flag(value),
        )

    def _combine(self, value: Value) -> None:
        """Store a sum, a normalisation or an activation."""
        terms: list[TermOf] = []
        activation = value.op.kind if isinstance(value.op, Act) else Activation.none
        self._collect(value.inputs[0] if isinstance(value.op, Act) else value, None, ALWAYS, terms, value)
        place = self.place(value)
        channels = place.channels
        for term in terms:
            if term.norm is not None or term.weight is not None:
                term.coefficient = self.vector("coefficient", channels)
        constant = None
        if any(term.norm is not None for term in terms):
            constant = self.vector("constant", channels)
        self.stored[value] = Stored(terms, constant, activation)
        if constant is not None or any(term.coefficient is not None for term in terms):
            self._coefficients(value, terms, constant, channels)
        moments, sums = self._new_moments(value, place)
        vectors = [t.coefficient for t in terms if t.coefficient is not None]
        self.tasks.step(
            "combine",
            value,
            lambda _: Combine(
                tuple(
                    Term(
                        self.place(t.value).map(),
                        NONE if t.coefficient is None else t.coefficient.offset,
                        t.flag,
                    )
                    for t in terms
                ),
                NONE if constant is None else constant.offset,
                *(activation, place.map(), 0, moments),
            ),
            reads=(
                *(cell for t in terms for cell in self.place(t.value).cells()),
                *vectors,
                *(() if constant is None else (constant,)),
            ),
            writes=(*place.cells(), *sums),
            flag=self.flag(value),
        )

    def _collect(
        self, value: Value, weight: Weight | None, flag: int, terms: list[TermOf], root: Value
    ) -> None:
        """The terms that `value`, times a weight, adds to a sum."""
        op = value.op
        if isinstance(op, Zero):
            if weight is not None:
                self.zeros.setdefault(root, []).append((weight, flag))
            return
        if isinstance(op, Sum) and (value is root or self.is_merged_sum(value)):
            for info, part in zip(op.terms, value.inputs, strict=True):
                inner = self.flags.all_of([flag, *(self.flags.chosen(need) for need in info.needs)])
                self._collect(part, info.weight, inner, terms, root)
        elif isinstance(op, Norm) and (value is root or self.is_lazy_norm(value)):
            terms.append(TermOf(value.inputs[0], value, weight, flag, None))
        else:
            terms.append(TermOf(value, None, weight, flag, None))

    def _coefficients(
        self, value: Value, terms: list[TermOf], constant: Buffer | None, channels: int
    ) -> None:
        decision = self.tensor("decision") if any(t.weight is not None for t in terms) else NONE
        rows = [t for t in terms if t.coefficient is not None]

        def make() -> Coefficients:
            weighted = []
            for term in rows:
                vectors = None if term.norm is None else self.vectors[term.norm]
                scale, shift = scale_and_shift(vectors, channels)
                slot = NONE if term.weight is None else self.settings.slot(term.weight)
                assert term.coefficient is not None
                weighted.append(Weighted(slot, scale, shift, term.coefficient.offset, term.flag))
            at = NONE if constant is None else constant.offset
            return Coefficients(tuple(weighted), decision, at, channels, flag=self.flag(value))

        self.tasks.barrier(
            "coefficients",
            value,
            make,
            [self.vectors[t.norm] for t in rows if t.norm is not None],
            [*(t.coefficient for t in rows), *(() if constant is None else (constant,))],
            self.flag(value),
        )
