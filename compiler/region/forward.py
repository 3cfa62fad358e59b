"""From the values of a region to the tasks of its forward pass.

A value is stored as a map only where it has to be: a normalisation that only sums or one convolution read is applied
where it is read, an activation in front of convolutions likewise, a depthwise convolution followed by a pointwise one
is never stored.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from nascompile.compiler.region.flags import ALWAYS, Flags
from nascompile.compiler.region.ir import (
    Act,
    Cat,
    Conv,
    Crop,
    Graph,
    Norm,
    PoolOp,
    Source,
    Sum,
    TensorRef,
    Unsupported,
    Value,
    Weight,
    Zero,
)
from nascompile.compiler.region.memory import Buffer, Place, new_place
from nascompile.compiler.region.settings import Settings
from nascompile.compiler.region.tasks import Staged, Summed, Task, TaskList
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Coefficients,
    Combine,
    Convolve,
    Load,
    Map,
    Normalise,
    PackDense,
    PackDepthwise,
    Pool,
    Stage,
    Store,
    Tap,
    Term,
    Weighted,
)

Segments = tuple[tuple[int, int, int], ...]


@dataclass(eq=False, slots=True)
class TermOf:
    """One term of a stored sum: weight * value, where the value is a map, normalised or not."""

    value: Value
    norm: Value | None
    weight: Weight | None
    flag: int
    coefficient: Buffer | None


@dataclass(eq=False, slots=True)
class Stored:
    """A value made by Combine: its terms, and what is applied to their sum."""

    terms: list[TermOf]
    constant: Buffer | None
    activation: Activation


@dataclass(eq=False, slots=True)
class ConvOf:
    """A convolution step: the value whose map it writes, what it reads, and its packed weights.

    `depthwise` is set where a depthwise part comes first (or is all there is); `dense` is the dense or pointwise part.
    """

    value: Value
    source: Value
    staged: Staged
    staged_norm: Value | None
    crop: tuple[int, int]
    depthwise: Conv | None
    dense: Conv | None
    depthwise_weights: Buffer | None
    weights: Buffer | None
    transposed: Buffer | None

    @property
    def taps_of(self) -> Conv:
        """The part that reads the image."""
        part = self.depthwise or self.dense
        assert part is not None
        return part


class Forward:
    """Builds the forward tasks and keeps what the backward pass has to know."""

    def __init__(self, graph: Graph, settings: Settings, flags: Flags) -> None:
        self.graph, self.settings, self.flags = graph, settings, flags
        self.tasks = TaskList()
        self.buffers: list[Buffer] = []
        self.places: dict[Value, Place] = {}
        self.stored: dict[Value, Stored] = {}
        self.convs: dict[Value, ConvOf] = {}
        self.vectors: dict[Value, Buffer] = {}
        self.indices: dict[Value, Buffer] = {}
        self.moments: dict[Value, int] = {}
        self.tensors: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self._packed: dict[TensorRef, tuple[Buffer | None, Buffer | None]] = {}
        self._packers: dict[TensorRef, list[Value]] = {}
        self.sums = 0
        self._outputs = set(graph.outputs)
        self._parts = self._placed_parts()
        for value in graph.values:
            self._lower(value)
        for index, value in enumerate(graph.outputs):
            self._store(index, value)

    # ---- what is stored ----------------------------------------------------------------------------------------------

    def is_lazy_norm(self, value: Value) -> bool:
        """Whether a normalisation is applied by its readers."""
        if not isinstance(value.op, Norm) or value in self._outputs or not value.users:
            return False
        if all(isinstance(user.op, Sum) for user in value.users):
            return True
        return len(value.users) == 1 and isinstance(value.users[0].op, Conv | Act)

    def is_staged_act(self, value: Value) -> bool:
        """Whether an activation is applied while convolutions read."""
        if not isinstance(value.op, Act) or value in self._outputs or not value.users:
            return False
        return all(_is_read_by_convolutions(user) for user in value.users)

    def is_merged_sum(self, value: Value) -> bool:
        """Whether a sum is part of the one sum that reads it."""
        if not isinstance(value.op, Sum) or len(value.users) != 1 or value in self._outputs:
            return False
        user = value.users[0]
        if isinstance(user.op, Act):
            return not self.is_staged_act(user)
        if not isinstance(user.op, Sum) or user.inputs.count(value) > 1:
            return False
        return user.op.terms[user.inputs.index(value)].weight is None

    def is_fused_depthwise(self, value: Value) -> bool:
        """Whether a depthwise convolution is computed inside the pointwise one that reads it."""
        if not isinstance(value.op, Conv) or not value.op.is_depthwise or value in self._outputs:
            return False
        users = value.users
        return len(users) == 1 and isinstance(users[0].op, Conv) and users[0].op.is_pointwise

    def _placed_parts(self) -> dict[Value, tuple[Value, int]]:
        """The values that are computed right into a concatenation: which, and their first padded channel."""
        parts: dict[Value, tuple[Value, int]] = {}
        for cat in self.graph.values:
            if not isinstance(cat.op, Cat):
                continue
            first = 0
            for part in cat.inputs:
                # a part that others read as well must be there whenever they are
                alone = cat.owners is None or len(part.users) == 1
                free = part not in parts and cat.inputs.count(part) == 1 and alone
                if free and isinstance(part.op, Sum | Norm | Act | Conv | PoolOp):
                    parts[part] = (cat, first)
                first += self._padded(part.channels)
        return parts

    def _padded(self, channels: int) -> int:
        return -(-channels // self.settings.lane) * self.settings.lane

    def segments(self, value: Value) -> Segments:
        """Where the channels of a value lie in its map."""
        if isinstance(value.op, Cat):
            found, logical, padded = [], 0, 0
            for part in value.inputs:
                found.append((logical, part.channels, padded))
                logical += part.channels
                padded += self._padded(part.channels)
            return tuple(found)
        if isinstance(value.op, Act | Crop | Norm):
            return (
                self.segments(value.inputs[0])
                if not isinstance(value.op, Norm)
                else ((0, value.channels, 0),)
            )
        return ((0, value.channels, 0),)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def vector(self, name: str, floats: int) -> Buffer:
        """A new buffer that lives throughout."""
        buffer = Buffer(name, floats, True)
        self.buffers.append(buffer)
        return buffer

    def new_map(self, value: Value, name: str) -> Place:
        """A map of the size of the value."""
        channels = sum(self._padded(count) for _, count, _ in self.segments(value))
        place = new_place(name, self.settings.images, channels, *value.shape[1:])
        if isinstance(value.op, Cat):
            place.buffer.borders = [padded for _, _, padded in self.segments(value)]
        self.buffers.append(place.buffer)
        return place

    def place(self, value: Value) -> Place:
        """The map of a value that is stored."""
        if value not in self.places:
            if value in self._parts:
                cat, first = self._parts[value]
                self.places[value] = self.place(cat).part(first, self._padded(value.channels))
            else:
                self.places[value] = self.new_map(value, f"v{value.number}")
        return self.places[value]

    def tensor(self, what: Hashable) -> int:
        """The number of a tensor: a TensorRef, or ("input", i), ("output", i), "decision"."""
        if what not in self._numbers:
            self._numbers[what] = len(self.tensors)
            self.tensors.append(what)
        return self._numbers[what]

    def optional(self, ref: TensorRef | None) -> int:
        return NONE if ref is None else self.tensor(ref)

    def new_sums(self, count: int) -> int:
        """An offset in the sums."""
        self.sums += count
        return self.sums - count

    def flag(self, value: Value) -> int:
        """When the value is computed."""
        if value.owners is None:
            return ALWAYS
        return self.flags.any_of(self.flags.chosen(owner) for owner in value.owners)

    # ---- tasks -------------------------------------------------------------------------------------------------------

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
        elif isinstance(op, Crop):
            if any(not isinstance(user.op, Conv) for user in value.users) or value in self._outputs:
                raise Unsupported("a crop is read by something else than a convolution")
        elif isinstance(op, Zero) and (
            value in self._outputs or any(not isinstance(u.op, Sum) for u in value.users)
        ):
            raise Unsupported("zeros are read by something else than a sum")

    def _load(self, value: Value, op: Source) -> None:
        place, number = self.place(value), self.tensor(("input", op.index))
        strides, segments = self.settings.strides(value.shape), self.segments(value)
        self._step(
            f"load input {op.index}",
            lambda _: Load(number, *strides, segments, place.map(), 0),
            writes=place.cells(),
        )

    def _store(self, index: int, value: Value) -> None:
        place, number = self.place(value), self.tensor(("output", index))
        strides, segments = self.settings.strides(value.shape), self.segments(value)
        self._step(
            f"store output {index}",
            lambda _: Store(number, *strides, segments, place.map()),
            reads=place.cells(),
        )

    def _step(self, name: str, make: Any, **more: Any) -> None:
        task = Task(
            name, make, False, more.pop("reads", ()), more.pop("writes", ()), more.pop("flag", ALWAYS), **more
        )
        self.tasks.add(task)

    def _barrier(self, name: str, make: Any, reads: Any, writes: Any, flag: int) -> None:
        self.tasks.add(Task(name, lambda _: make(), True, tuple(reads), tuple(writes), flag))

    def _new_moments(self, value: Value, place: Place) -> tuple[int, tuple[Hashable, ...]]:
        """Sums for the statistics of a map, where a normalisation of its reads them."""
        if not any(isinstance(user.op, Norm) and user.op.by_batch for user in value.users):
            return NONE, ()
        at = self.moments[value] = self.new_sums(2 * place.channels)
        return at, (Summed("sums", at),)

    def staged(
        self, value: Value, padding: tuple[int, int]
    ) -> tuple[Value, Staged, Value | None, tuple[int, int]]:
        """What a convolution that reads `value` really reads: the stored value, how, its normalisation, the crop."""
        crop, activation, norm = (0, 0), Activation.none, None
        if isinstance(value.op, Crop):
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
        one = ConvOf(value, source, staged, norm, crop, depthwise, dense, None, None, None)
        if depthwise is not None:
            one.depthwise_weights = self._pack_depthwise(
                depthwise, staged.source.channels, self.segments(source), value
            )
        if dense is not None:
            outputs = self._padded(value.channels)
            one.weights, one.transposed = self._pack_dense(
                dense, staged.source.channels, outputs, source, value
            )
        self.convs[value] = one
        place = self.place(value)
        moments, sums = self._new_moments(value, place)
        packed = [b for b in (one.depthwise_weights, one.weights) if b is not None]
        self._step(
            f"convolve {value.number}",
            lambda maps: _make_convolve(one, maps["x"], place.map(), moments),
            reads=(*staged.source.cells(), *packed, *(() if staged.vectors is None else (staged.vectors,))),
            writes=(*place.cells(), *sums),
            flag=self.flag(value),
            staged=staged,
            work=_work(one),
        )

    def _pack_depthwise(self, op: Conv, channels: int, segments: Segments, value: Value) -> Buffer:
        count = op.kernel[0] * op.kernel[1]
        self._packers.setdefault(op.weight, []).append(value)
        known = self._packed.get(op.weight)
        if known is not None and known[0] is not None:
            return known[0]
        buffer, tensor = self.vector("depthwise weights", count * channels), self.tensor(op.weight)
        self._packed[op.weight] = (buffer, None)
        self._barrier(
            "pack",
            lambda: PackDepthwise(
                *(tensor, count, segments, channels, buffer.offset), flag=self._pack_flag(op.weight)
            ),
            (),
            (buffer,),
            ALWAYS,
        )
        return buffer

    def _pack_dense(
        self, op: Conv, inputs: int, outputs: int, source: Value, value: Value
    ) -> tuple[Buffer, Buffer | None]:
        self._packers.setdefault(op.weight, []).append(value)
        if op.weight in self._packed:
            return self._packed[op.weight]  # type: ignore[return-value]
        count = op.kernel[0] * op.kernel[1]
        size, tensor = count * inputs * outputs, self.tensor(op.weight)
        target = self.vector("weights", size)
        transposed = self.vector("transposed weights", size) if self.settings.has_backward else None
        segments = self.segments(source), self.segments(value)
        self._packed[op.weight] = (target, transposed)
        self._barrier(
            "pack",
            lambda: PackDense(
                *(tensor, count, *segments, inputs, outputs),
                target.offset,
                NONE if transposed is None else transposed.offset,
                flag=self._pack_flag(op.weight),
            ),
            (),
            (target,) if transposed is None else (target, transposed),
            ALWAYS,
        )
        return target, transposed

    def _pack_flag(self, weight: TensorRef) -> int:
        return self.flags.any_of(self.flag(value) for value in self._packers[weight])

    def _pool(self, value: Value, op: PoolOp) -> None:
        source = value.inputs[0]
        x, y = self.place(source), self.place(value)
        moments, sums = self._new_moments(value, y)
        index: Buffer | None = None
        image = -(-y.height * y.width * y.channels // 4)
        if op.is_max and self.settings.has_backward:
            index = self.indices[value] = Buffer(f"index {value.number}", self.settings.images * image, False)
            self.buffers.append(index)
        self._step(
            f"pool {value.number}",
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

    def _normalise(self, value: Value, op: Norm) -> None:
        source = value.inputs[0]
        channels = self.place(source).channels
        out = self.vectors[value] = self.vector(f"norm {value.number}", 4 * channels)
        moments = self.moments[source] if op.by_batch else NONE
        elements = self.settings.images * source.shape[1] * source.shape[2]
        segments = ((op.first, value.channels, 0),)
        tensors = (
            *(self.optional(op.gamma), self.optional(op.beta)),
            self.optional(op.running_mean) if op.updates or not op.by_batch else NONE,
            self.optional(op.running_var) if op.updates or not op.by_batch else NONE,
            self.optional(op.counter) if op.updates and op.first == 0 else NONE,
        )
        self._barrier(
            f"normalise {value.number}",
            lambda: Normalise(
                *(moments, elements, op.epsilon, op.momentum, *tensors, segments, channels, out.offset),
                flag=self.flag(value),
            ),
            () if moments == NONE else (Summed("sums", moments),),
            (out,),
            self.flag(value),
        )

    def _concatenate(self, value: Value) -> None:
        whole = self.place(value)
        for part in value.inputs:
            if part.channels % self.settings.lane and part is not value.inputs[-1]:
                raise Unsupported(
                    f"{part.channels} channels are concatenated, not a multiple of {self.settings.lane}"
                )
        for part, (_, _, first) in zip(value.inputs, self.segments(value), strict=True):
            if self._parts.get(part) == (value, first):
                continue
            source, target = self.place(part), whole.part(first, self._padded(part.channels))
            self._step(
                f"copy into {value.number}",
                lambda _, s=source, t=target: Combine(
                    (Term(s.map(), NONE, NONE),), NONE, Activation.none, t.map(), 0, NONE
                ),
                reads=source.cells(),
                writes=target.cells(),
                flag=self.flag(value),
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
        self._step(
            f"combine {value.number}",
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
                at = NONE if term.norm is None else self.vectors[term.norm].offset
                scale, shift = (NONE, NONE) if at == NONE else (at + 2 * channels, at + 3 * channels)
                slot = NONE if term.weight is None else self.settings.slot(term.weight)
                assert term.coefficient is not None
                weighted.append(Weighted(slot, scale, shift, term.coefficient.offset, term.flag))
            at = NONE if constant is None else constant.offset
            return Coefficients(tuple(weighted), decision, at, channels, flag=self.flag(value))

        self._barrier(
            f"coefficients {value.number}",
            make,
            [self.vectors[t.norm] for t in rows if t.norm is not None],
            [*(t.coefficient for t in rows), *(() if constant is None else (constant,))],
            self.flag(value),
        )


def _is_read_by_convolutions(value: Value) -> bool:
    if isinstance(value.op, Crop):
        return all(isinstance(user.op, Conv) for user in value.users)
    return isinstance(value.op, Conv)


def taps(op: Conv, row: int, pixel: int, crop: tuple[int, int]) -> tuple[Tap, ...]:
    """Where a convolution reads, from the first pixel of its window."""
    return tuple(
        Tap(
            (i * op.dilation[0] - op.padding[0] + crop[0]) * row
            + (j * op.dilation[1] - op.padding[1] + crop[1]) * pixel,
            i * op.kernel[1] + j,
        )
        for i in range(op.kernel[0])
        for j in range(op.kernel[1])
    )


def conv_fields(one: ConvOf, x: Map) -> dict[str, Any]:
    """The fields that Convolve and ConvolveBackward have in common."""
    reading = taps(one.taps_of, x.row, x.pixel, one.crop)
    has_depthwise = one.depthwise is not None
    pointwise = (Tap(0, 0),) if one.dense is not None else ()
    return {
        "x": x,
        "stride_h": one.taps_of.stride[0],
        "stride_w": one.taps_of.stride[1],
        "depthwise_taps": reading if has_depthwise else (),
        "depthwise_weights": NONE if one.depthwise_weights is None else one.depthwise_weights.offset,
        "taps": pointwise if has_depthwise else reading,
    }


def _make_convolve(one: ConvOf, x: Map, y: Map, moments: int) -> Convolve:
    weights = NONE if one.weights is None else one.weights.offset
    return Convolve(y=y, weights=weights, moments=moments, **conv_fields(one, x))


def _work(one: ConvOf) -> int:
    pixels = one.value.shape[1] * one.value.shape[2]
    inputs = one.source.channels
    depthwise = 0 if one.depthwise is None else one.depthwise.kernel[0] * one.depthwise.kernel[1] * inputs
    dense = (
        0 if one.dense is None else one.dense.kernel[0] * one.dense.kernel[1] * inputs * one.value.channels
    )
    return 2 * pixels * (depthwise + dense)


def make_stage(staged: Staged, target: Map, flag: int) -> Stage:
    """The step that stages an image."""
    channels = staged.source.channels
    at = NONE if staged.vectors is None else staged.vectors.offset
    vectors = (NONE, NONE) if at == NONE else (at + 2 * channels, at + 3 * channels)
    return Stage(staged.source.map(), *vectors, staged.activation, target, flag=flag)
