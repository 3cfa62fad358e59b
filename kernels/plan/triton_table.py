"""How every step of a program is carried out on a GPU: the launches of Triton kernels, and their records."""

from __future__ import annotations

from collections.abc import Callable
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
    Mask,
    Pick,
    Pool,
    PoolBackward,
    Reduce,
    Stage,
    Step,
    Store,
    Unstage,
)
from nascompile.kernels.plan.triton_areas import Area, block_area, sum_areas, vectors, whole
from nascompile.kernels.plan.triton_blocks import SMALLEST, block_of
from nascompile.kernels.plan.triton_convolutions import Convolutions
from nascompile.kernels.plan.triton_launches import Lowered
from nascompile.kernels.plan.triton_schedule import Job


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


class _Lowering(Convolutions):
    def lower_step(self, step: Step) -> None:
        _STEPS[type(step)](self, step)

    # ---- steps over maps ----

    def copy(self, step: Load | Store) -> None:
        is_load = isinstance(step, Load)
        place = step.target if is_load else step.source
        record = [step.flag, step.tensor, step.stride_n, step.stride_c, step.stride_h, step.stride_w]
        record += [*self.table.segments(step.segments), step.adds if is_load else 0, *self.table.map(place)]
        kernel, tensor = "load" if is_load else "store", whole(step.tensor)
        reads, writes = ([tensor], None) if is_load else ([self.area(place)], [tensor])
        self.over(kernel, place, block_of(place.channels), record, kernel, reads, writes)

    def stage(self, step: Stage) -> None:
        record = [step.flag, *self.table.map(step.source), step.scale, step.shift, step.activation]
        record += self.table.map(step.target)
        channels = step.target.channels
        reads = [self.area(step.source), *vectors(channels, step.scale, step.shift)]
        self.over("stage", step.target, block_of(channels), record, "stage", reads)

    def combine(self, step: Combine, name: str = "combine") -> None:
        channels = step.target.channels
        block = block_of(channels)
        record = [step.flag, *self.table.map(step.target), *self.table.terms(step.terms), step.constant]
        record += [step.activation, step.adds, self.moments(step, step.target, block)]
        reads = sum_areas(step.terms, step.constant, self.images, channels)
        self.over("combine", step.target, block, record, name, reads)

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
        # a term's coefficient stands for where its sum goes
        reads = [self.area(place), *(self.area(term.map) for term in step.terms)]
        self.over("reduce", place, block, record, "reduce", reads, ())

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
        reads = [self.area(step.gradient), self.area(step.source)]
        reads += vectors(step.target.channels, step.scale, step.shift)
        self.over("unstage", step.target, block, record, "unstage", reads)

    def mask(self, step: Mask) -> None:
        record = [step.flag, *self.table.map(step.gradient), *self.table.map(step.value), step.activation]
        block = block_of(step.gradient.channels)
        self.over("mask", step.gradient, block, record, "mask", [self.area(step.value)])

    def pick(self, step: Pick) -> None:
        record = [step.flag, *self.table.map(step.source), *self.table.map(step.target)]
        record += [step.first_source, step.step_source, step.first_target, step.step_target]
        record += [step.count, step.adds]
        block = block_of(step.target.channels)
        self.over("pick", step.target, block, record, "pick", [self.area(step.source)])

    def gate(self, step: Gate) -> None:
        block = block_of(step.target.channels)
        gate = self.table.map(step.gate)
        if (step.gate.height, step.gate.width) == (1, 1):
            # its one pixel is read for all
            gate[3] = gate[4] = 0
        record = [step.flag, *self.table.map(step.image), *gate, *self.table.map(step.target), step.adds]
        record.append(self.moments(step, step.target, block))
        reads = [self.area(step.image), self.area(step.gate)]
        self.over("gate", step.target, block, record, "gate", reads)

    def gate_gradient(self, step: GateGradient) -> None:
        block = block_of(step.target.channels)
        record = [step.flag, *self.table.map(step.gradient), *self.table.map(step.image)]
        record += self.table.map(step.target)
        size = self.images, step.target.channels // block["BLOCK_C"]
        reads, writes = [self.area(step.gradient), self.area(step.image)], [self.area(step.target)]
        self.jobs.append(Job("gate_gradient", block, size, [record], "gate gradient", reads, writes))

    # ---- pooling ----

    def window(self, step: Pool | PoolBackward) -> list[int]:
        return [
            *(step.kernel_h, step.kernel_w, step.stride_h, step.stride_w, step.padding_h, step.padding_w),
            *(step.counts_padding, step.index, step.index_image),
        ]

    def numbers(self, step: Pool | PoolBackward) -> list[Area]:
        """Where the numbers of the maxima lie."""
        if step.index == NONE:
            return []
        return [block_area("slab", step.index, self.images * step.index_image)]

    def pool(self, step: Pool) -> None:
        block = block_of(step.y.channels)
        record = [step.flag, *self.table.map(step.x), *self.table.map(step.y), *self.window(step)]
        record.append(self.moments(step, step.y, block))
        block["IS_MAX"] = bool(step.is_max)
        writes = [self.area(step.y), *self.numbers(step)]
        self.over("pool", step.y, block, record, "pool", [self.area(step.x)], writes)

    def pool_backward(self, step: PoolBackward) -> None:
        none = Activation.none
        dy = Combine(step.terms, step.constant, none, step.tile, 0, NONE, flag=step.flag)
        self.combine(dy, "pool backward: dy")
        record = [step.flag, *self.table.map(step.tile), *self.table.map(step.dx), *self.window(step)]
        block = {**block_of(step.dx.channels), "IS_MAX": bool(step.is_max)}
        reads = [self.area(step.tile), *self.numbers(step)]
        self.over("pool_backward", step.dx, block, record, "pool backward: dx", reads)


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
