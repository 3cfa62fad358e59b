"""How every step of a program is carried out on a GPU: the launches of Triton kernels, and their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Convolve,
    ConvolveBackward,
    Gate,
    GateGradient,
    Load,
    Map,
    Mask,
    Pick,
    Pool,
    PoolBackward,
    Reduce,
    Space,
    Stage,
    Step,
    Store,
    Tap,
    Unstage,
)
from nascompile.kernels.plan.triton_blocks import (
    SMALLEST,
    block_of,
    dense_block,
    gradient_block,
)
from nascompile.kernels.plan.triton_launches import Entry, Launches, Lowered


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


class _Lowering(Launches):
    def lower_step(self, step: Step) -> None:
        _STEPS[type(step)](self, step)

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
        goals = [(t.flag, k * channels, channels, t.coefficient) for k, t in enumerate(step.terms)]
        if step.total != NONE:
            goals.append((NONE, width - channels, channels, step.total))
        at = self.sums(step.flag, self.grid(place, block)[0], width, goals)
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

    def pick(self, step: Pick) -> None:
        record = [step.flag, *self.table.map(step.source), *self.table.map(step.target)]
        record += [step.first_source, step.step_source, step.first_target, step.step_target]
        record += [step.count, step.adds]
        self.over("pick", step.target, block_of(step.target.channels), record, "pick")

    def gate(self, step: Gate) -> None:
        block = block_of(step.target.channels)
        gate = self.table.map(step.gate)
        if (step.gate.height, step.gate.width) == (1, 1):
            # its one pixel is read for all
            gate[3] = gate[4] = 0
        record = [step.flag, *self.table.map(step.image), *gate, *self.table.map(step.target), step.adds]
        record.append(self.moments(step, step.target, block))
        self.over("gate", step.target, block, record, "gate")

    def gate_gradient(self, step: GateGradient) -> None:
        block = block_of(step.target.channels)
        record = [step.flag, *self.table.map(step.gradient), *self.table.map(step.image)]
        record += self.table.map(step.target)
        size = self.images, step.target.channels // block["BLOCK_C"]
        self.launch("gate_gradient", block, size, [record], "gate gradient")

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
        block = dense_block(y.channels) if is_dense else block_of(y.channels)
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
            block = dense_block(dd.channels)
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
        partials, width = self.partial_sums(shares * len(taps) * size), len(taps) * size
        if [tap.weight for tap in taps] == list(range(len(taps))):
            goals = [(0, width, at)]
        else:
            goals = [(k * size, size, at + tap.weight * size) for k, tap in enumerate(taps)]
        for column, columns, target in goals:
            flags = (step.flag, NONE)
            self.entries.append(Entry(flags, partials + column, shares, width, columns, target, False))
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
        block = block_of(dx.channels) if is_depthwise else dense_block(dx.channels)
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


_STEPS: dict[type, Callable[[_Lowering, Any], None]] = {
    Load: _Lowering.copy,
    Store: _Lowering.copy,
    Stage: _Lowering.stage,
    Combine: _Lowering.combine,
    Reduce: _Lowering.reduce,
    Unstage: _Lowering.unstage,
    Mask: _Lowering.mask,
    Pick: _Lowering.pick,
    Gate: _Lowering.gate,
    GateGradient: _Lowering.gate_gradient,
    Pool: _Lowering.pool,
    PoolBackward: _Lowering.pool_backward,
    Convolve: _Lowering.convolve,
    ConvolveBackward: _Lowering.convolve_backward,
}
