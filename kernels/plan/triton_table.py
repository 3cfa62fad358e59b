"""From a program to the launches that carry it out on a GPU, and the table in device memory that they read.

Every image has its own scratch there, as in reference.State. Sums over pixels go through partial sums: every
step of a phase has a part of work memory for them, and one launch at the end of the phase adds them up in a
fixed order. The barrier operations of a phase are carried out kind by kind, many in one launch: none reads
what an operation of a later kind writes. Those that write the same place go to different launches, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nascompile.kernels.plan.program import Phase, Program, aligned
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Coefficients,
    Combine,
    Convolve,
    ConvolveBackward,
    DecisionGradient,
    Load,
    Map,
    Mask,
    Normalise,
    NormaliseBackward,
    PackDense,
    PackDepthwise,
    Pool,
    PoolBackward,
    Reduce,
    Space,
    Stage,
    Store,
    Tap,
    UnpackDense,
    UnpackDepthwise,
    Unstage,
)
from nascompile.kernels.plan.triton_blocks import SMALLEST, Block, block_of, dense_block, gradient_block
from nascompile.kernels.plan.triton_records import Table, rounds, written_by

ORDER = (
    *(PackDepthwise, PackDense, Normalise, Coefficients),
    *(NormaliseBackward, UnpackDepthwise, UnpackDense, DecisionGradient),
)
"""The kinds of barrier operations, in an order in which those of one phase may be carried out."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, its block sizes, its grid, and where the list of its records begins. `names`: the steps'
    kinds."""

    kernel: str
    block: Block
    grid: tuple[int, int, int]
    first: int
    name: str


@dataclass(frozen=True, slots=True)
class Lowered:
    """The launches of a program, their table, and work memory: its floats, and how many are zero at the
    start."""

    launches: tuple[Launch, ...]
    words: list[int]
    zeroed: int
    work: int


@dataclass(slots=True)
class _Entry:
    """Partial sums of a step: rows x columns floats at `partials`, `width` floats apart, and where they
    go."""

    flags: tuple[int, int]
    partials: int
    rows: int
    width: int
    columns: int
    target: int
    is_sums: bool


def why_not(program: Program) -> str | None:
    """Why the kernels cannot carry out the program, or None."""
    if program.lane % SMALLEST:
        return f"channels are padded to a multiple of {program.lane}, the kernels need {SMALLEST}"
    return None


def lower(program: Program) -> Lowered:
    """The launches of a program. ValueError where the kernels cannot carry it out."""
    reason = why_not(program)
    if reason is not None:
        raise ValueError(reason)
    lowering = _Lowering(program)
    for phase in program.phases:
        lowering.phase(phase)
    return Lowered(tuple(lowering.launches), lowering.table.words, lowering.zeroed, lowering.top)


class _Lowering:
    def __init__(self, program: Program) -> None:
        self.program, self.images = program, program.images
        self.launches: list[Launch] = []
        self.gradients = aligned(2 * program.sums)
        scratch, scratch_image = self.gradients + aligned(program.gradients), aligned(program.scratch)
        self.table = Table(self.gradients, scratch, scratch_image)
        self.zeroed = scratch + self.images * scratch_image
        fused = [
            step.y_height * step.y_width * step.y_channels
            for phase in program.phases
            for step in phase.steps
            if isinstance(step, ConvolveBackward) and step.depthwise_taps and step.taps
        ]
        self.partials = self.zeroed + aligned(self.images * max(fused, default=0))
        self.top = self.next = self.partials
        self.entries: list[_Entry] = []

    def launch(
        self, kernel: str, block: Block, grid: tuple[int, int], records: Sequence[Sequence[int]], name: str
    ) -> None:
        first = self.table.add([self.table.add(record) for record in records])
        self.launches.append(Launch(kernel, block, (*grid, len(records)), first, name))

    def over(self, kernel: str, place: Map, block: Block, record: Sequence[int], name: str) -> None:
        """Launch a kernel over the pixels and channels of a map."""
        self.launch(kernel, block, self.grid(place, block), [record], name)

    def grid(self, place: Map, block: Block) -> tuple[int, int]:
        pixels = self.images * place.height * place.width
        return -(-pixels // block["BLOCK_P"]), place.channels // block["BLOCK_C"]

    # ---- phases ----

    def phase(self, phase: Phase) -> None:
        for kind in ORDER:
            ops = [op for op in phase.barriers if type(op) is kind]
            for together in rounds(ops, written_by):
                self.barrier(kind, together)
        self.next = self.partials
        for step in phase.steps:
            _STEPS[type(step)](self, step)
        for entries in rounds(self.entries, _target):
            for is_sums in (True, False):
                self.add_up([entry for entry in entries if entry.is_sums == is_sums], is_sums)
        self.entries = []

    def add_up(self, entries: Sequence[_Entry], is_sums: bool) -> None:
        if not entries:
            return
        block = {"BLOCK_R": 64, "BLOCK": 16, "IS_SUMS": is_sums, "num_warps": 4}
        widest = max(entry.columns for entry in entries)
        start = 0 if is_sums else self.gradients
        records = [[*e.flags, e.partials, e.rows, e.width, e.columns, start + e.target] for e in entries]
        self.launch("add_up", block, (-(-widest // 16), 1), records, "add up")

    def sums(
        self, flags: tuple[int, int], rows: int, width: int, targets: Sequence[tuple[int, int, int]]
    ) -> int:
        """Work memory for `rows` rows of `width` partial sums; targets: (column, columns, offset in the
        sums)."""
        at = self._partials(rows * width)
        for column, columns, target in targets:
            self.entries.append(_Entry(flags, at + column, rows, width, columns, target, True))
        return at

    def _partials(self, floats: int) -> int:
        at = self.next
        self.next += aligned(floats)
        self.top = max(self.top, self.next)
        return at

    def moments(self, step: Any, place: Map, block: Block) -> int:
        """Partial sums of a map and of another, for `step.moments`."""
        if step.moments == NONE:
            return NONE
        width = 2 * place.channels
        return self.sums((step.flag, NONE), self.grid(place, block)[0], width, [(0, width, step.moments)])

    # ---- steps over maps ----

    def copy(self, step: Load | Store) -> None:
        is_load = isinstance(step, Load)
        place = step.target if is_load else step.source
        record = [step.flag, step.tensor, step.stride_n, step.stride_c, step.stride_h, step.stride_w]
        record += [*self.table.segments(step.segments), step.adds if is_load else 0, *self.table.map(place)]
        kernel = "load" if is_load else "store"
        self.over(kernel, place, block_of(place.channels), record, kernel)

    def stage(self, step: Stage) -> None:
        record = [step.flag, *self.table.map(step.source), step.scale, step.shift, step.activation]
        record += self.table.map(step.target)
        self.over("stage", step.target, block_of(step.target.channels), record, "stage")

    def combine(self, step: Combine, name: str = "combine") -> None:
        block = block_of(step.target.channels)
        record = [step.flag, *self.table.map(step.target), *self.table.terms(step.terms), step.constant]
        record += [step.activation, step.adds, self.moments(step, step.target, block)]
        self.over("combine", step.target, block, record, name)

    def reduce(self, step: Reduce) -> None:
        place, channels = step.gradient, step.gradient.channels
        block, width = block_of(channels), (len(step.terms) + 1) * channels
        rows = self.grid(place, block)[0]
        at = self._partials(rows * width)
        goals = [(k, term.coefficient, term.flag) for k, term in enumerate(step.terms)]
        if step.total != NONE:
            goals.append((len(step.terms), step.total, NONE))
        for k, target, flag in goals:
            self.entries.append(
                _Entry((step.flag, flag), at + k * channels, rows, width, channels, target, True)
            )
        record = [
            step.flag,
            *self.table.map(place),
            *self.table.terms(step.terms),
            int(step.total != NONE),
            at,
        ]
        self.over("reduce", place, block, record, "reduce")

    def unstage(self, step: Unstage) -> None:
        block = block_of(step.target.channels)
        record = [
            step.flag,
            *self.table.map(step.gradient),
            *self.table.map(step.source),
            step.scale,
            step.shift,
        ]
        record += [step.activation, *self.table.map(step.target), step.adds]
        record.append(self.moments(step, step.target, block))
        self.over("unstage", step.target, block, record, "unstage")

    def mask(self, step: Mask) -> None:
        record = [step.flag, *self.table.map(step.gradient), *self.table.map(step.value), step.activation]
        self.over("mask", step.gradient, block_of(step.gradient.channels), record, "mask")

    # ---- pooling ----

    def window(self, step: Pool | PoolBackward) -> list[int]:
        return [
            *(step.kernel_h, step.kernel_w, step.stride_h, step.stride_w, step.padding_h, step.padding_w),
            *(step.counts_padding, step.index, step.index_image),
        ]

    def pool(self, step: Pool) -> None:
        block = block_of(step.y.channels)
        record = [step.flag, *self.table.map(step.x), *self.table.map(step.y), *self.window(step)]
        record.append(self.moments(step, step.y, block))
        self.over("pool", step.y, {**block, "IS_MAX": bool(step.is_max)}, record, "pool")

    def pool_backward(self, step: PoolBackward) -> None:
        none = Activation.none
        dy = Combine(step.terms, step.constant, none, step.tile, 0, NONE, flag=step.flag)
        self.combine(dy, "pool backward: dy")
        record = [step.flag, *self.table.map(step.tile), *self.table.map(step.dx), *self.window(step)]
        block = {**block_of(step.dx.channels), "IS_MAX": bool(step.is_max)}
        self.over("pool_backward", step.dx, block, record, "pool backward: dx")

    # ---- convolutions ----

    def view(self, x: Map, strides: tuple[int, int]) -> list[int]:
        """A map as the outputs of a convolution see it: `strides` pixels apart."""
        words = self.table.map(x)
        words[3] *= strides[0]
        words[4] *= strides[1]
        return words

    def convolve(self, step: Convolve) -> None:
        y = step.y
        is_depthwise, is_dense = bool(step.depthwise_taps), bool(step.taps)
        block = dense_block(y.channels, step.x.channels) if is_dense else block_of(y.channels)
        record = [step.flag, *self.view(step.x, (step.stride_h, step.stride_w)), *self.table.map(y)]
        record += self.table.taps(step.depthwise_taps if is_depthwise else step.taps)
        record += [step.depthwise_weights if is_depthwise else step.weights, 0]
        record += [self.moments(step, y, block), step.weights]
        kernel = "depthwise" if not is_dense else "separable" if is_depthwise else "dense"
        self.over(kernel, y, block, record, f"convolve: {kernel}")

    def convolve_backward(self, step: ConvolveBackward) -> None:
        is_depthwise, is_dense = bool(step.depthwise_taps), bool(step.taps)
        dy = dd = step.padded
        if is_depthwise and is_dense:
            # dd takes the padded image; dy goes behind scratch
            channels, height, width = step.y_channels, step.y_height, step.y_width
            row, image = width * channels, height * width * channels
            dy = Map(Space.slab, self.zeroed, image, row, channels, channels, height, width)
        dy_words = self.table.map(dy)
        if dy is not dd:
            dy_words[0] = 1
        block = block_of(step.y_channels)
        record = [
            step.flag,
            *dy_words,
            *self.table.terms(step.terms),
            step.constant,
            Activation.none,
            0,
            NONE,
        ]
        self.over("combine", dy, block, record, "convolve backward: dy")
        source = self.view(step.x, (step.stride_h, step.stride_w))
        if is_dense and step.gradient != NONE:
            self.dense_gradient(step, source, dy, dy_words)
        if dy is not dd:
            block = dense_block(dd.channels, dy.channels)
            record = [step.flag, *dy_words, *self.table.map(dd), *self.table.taps((Tap(0, 0),))]
            self.over(
                "dense", dd, block, [*record, step.weights_transposed, 0, NONE], "convolve backward: dd"
            )
        if is_depthwise and step.depthwise_gradient != NONE:
            self.depthwise_gradient(step, source, dd)
        if step.needs_input:
            self.input_gradient(step, dd)

    def weights_sums(
        self, step: ConvolveBackward, taps: Sequence[Tap], shares: int, size: int, at: int
    ) -> int:
        """Partial sums [share][tap][size] for the gradients of the taps' weights."""
        partials, width = self._partials(shares * len(taps) * size), len(taps) * size
        if [tap.weight for tap in taps] == list(range(len(taps))):
            goals = [(0, width, at)]
        else:
            goals = [(k * size, size, at + tap.weight * size) for k, tap in enumerate(taps)]
        for column, columns, target in goals:
            flags = (step.flag, NONE)
            self.entries.append(_Entry(flags, partials + column, shares, width, columns, target, False))
        return partials

    def dense_gradient(self, step: ConvolveBackward, source: list[int], dy: Map, dy_words: list[int]) -> None:
        inputs, outputs = step.x.channels, step.y_channels
        block = {**gradient_block(outputs, inputs), "DEPTHWISE": bool(step.depthwise_taps)}
        taps = (Tap(0, 0),) if step.depthwise_taps else step.taps
        blocks = len(taps) * (inputs // block["BLOCK_I"]) * (outputs // block["BLOCK_C"])
        tiles = self.grid(dy, block)[0]
        size = len(taps) * inputs * outputs
        shares = max(1, min(tiles, -(-512 // blocks), (1 << 22) // size))
        at = self.weights_sums(step, taps, shares, inputs * outputs, step.gradient)
        record = [step.flag, *source, *dy_words, *self.table.taps(step.depthwise_taps or step.taps)]
        record += [step.depthwise_weights, shares, at]
        self.launch("dense_gradient", block, (shares, blocks), [record], "convolve backward: dense gradient")

    def depthwise_gradient(self, step: ConvolveBackward, source: list[int], dd: Map) -> None:
        taps, channels = step.depthwise_taps, dd.channels
        block = block_of(channels)
        at = self.weights_sums(step, taps, self.grid(dd, block)[0], channels, step.depthwise_gradient)
        record = [step.flag, *source, *self.table.map(dd), *self.table.taps(taps), NONE, 0, at]
        self.over("depthwise_gradient", dd, block, record, "convolve backward: depthwise gradient")

    def input_gradient(self, step: ConvolveBackward, dd: Map) -> None:
        dx = step.dx
        if not step.adds:
            self.combine(Combine((), NONE, Activation.none, dx, 0, NONE, flag=step.flag), "clear")
        is_depthwise = bool(step.depthwise_taps)
        block = block_of(dx.channels) if is_depthwise else dense_block(dx.channels, dd.channels)
        weights = step.depthwise_weights if is_depthwise else step.weights_transposed
        records, grids = [], [(0, 0)]
        for grid in step.grids:
            if not grid.taps or not grid.rows or not grid.columns:
                continue
            part = Map(
                *(dx.space, dx.offset + grid.top * dx.row + grid.left * dx.pixel, dx.image),
                *(dx.row * grid.step_h, dx.pixel * grid.step_w, dx.channels, grid.rows, grid.columns),
            )
            record = [
                step.flag,
                *self.table.map(dd),
                *self.table.map(part),
                *self.table.taps(grid.taps),
                weights,
                1,
                NONE,
            ]
            records.append(record)
            grids.append(self.grid(part, block))
        if records:
            size = max(x for x, _ in grids), max(y for _, y in grids)
            kernel = "depthwise" if is_depthwise else "dense"
            self.launch(kernel, block, size, records, "convolve backward: dx")

    # ---- barrier operations ----

    def barrier(self, kind: type, ops: Sequence[Any]) -> None:
        records = [self.table.barrier(op) for op in ops]
        size = 1
        block: Block = {"BLOCK": 64, "num_warps": 1}
        if kind in (Coefficients, NormaliseBackward):
            size = max(-(-op.channels // 64) for op in ops)
        elif kind in (PackDepthwise, UnpackDepthwise, PackDense, UnpackDense):
            is_dense = kind in (PackDense, UnpackDense)
            block = {"BLOCK": 256, "PACKS": kind in (PackDepthwise, PackDense), "num_warps": 4}
            counts = [op.in_channels * op.out_channels if is_dense else op.channels for op in ops]
            size = max(-(-op.count * count // 256) for op, count in zip(ops, counts, strict=True))
        self.launch(_KERNELS[kind], block, (size, 1), records, kind.__name__)


def _target(entry: _Entry) -> list[tuple[bool, int]]:
    """What an entry adds to, lane by lane."""
    end = entry.target + entry.columns
    return [(entry.is_sums, at) for at in range(entry.target, end, SMALLEST)]


_KERNELS: dict[type, str] = {
    PackDepthwise: "pack_depthwise",
    PackDense: "pack_dense",
    UnpackDepthwise: "pack_depthwise",
    UnpackDense: "pack_dense",
    Normalise: "normalise",
    Coefficients: "coefficients",
    NormaliseBackward: "normalise_backward",
    DecisionGradient: "decision_gradient",
}
_STEPS: dict[type, Callable[[_Lowering, Any], None]] = {
    Load: _Lowering.copy,
    Store: _Lowering.copy,
    Stage: _Lowering.stage,
    Combine: _Lowering.combine,
    Reduce: _Lowering.reduce,
    Unstage: _Lowering.unstage,
    Mask: _Lowering.mask,
    Pool: _Lowering.pool,
    PoolBackward: _Lowering.pool_backward,
    Convolve: _Lowering.convolve,
    ConvolveBackward: _Lowering.convolve_backward,
}
