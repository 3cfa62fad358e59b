"""A plan as text: its memory, its arithmetic, and every phase with the shapes that its steps work on."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from nascompile.compiler.region.plan import Direction, Plan
from nascompile.kernels.plan.steps import (
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
    Unstage,
)


def describe(plan: Plan) -> str:
    """The programs of a plan for people: bytes, FLOPs, phases, steps."""
    settings = plan.settings
    lines = [
        f"plan for {settings.images} images, {settings.chunks} threads, channels in {settings.lane}s, "
        f"{settings.executor.name} executor",
        f"memory: {_bytes(4 * plan.slab)} for maps, vectors and weights",
    ]
    for name, direction in (("forward", plan.forward), ("backward", plan.backward)):
        if direction is not None:
            lines += _direction(name, direction, settings.images)
    return "\n".join(lines)


def _direction(name: str, direction: Direction, images: int) -> list[str]:
    program = direction.program
    lines = [
        f"{name}: {len(program.phases)} phases, {direction.work * images / 1e9:.2f} GFLOP in convolutions, "
        f"{_bytes(4 * program.work)} of work memory"
    ]
    for number, phase in enumerate(program.phases):
        kinds = Counter(type(barrier).__name__ for barrier in phase.barriers)
        once = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"  phase {number}" + (f"  once: {once}" if once else ""))
        lines += [f"    {_step(step)}" for step in phase.steps]
    return lines


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _map(place: Map) -> str:
    where = "scratch" if place.space == Space.scratch else "slab"
    return f"{where}+{place.offset} {place.channels}x{place.height}x{place.width}"


def _activation(activation: Activation) -> str:
    return "" if activation == Activation.none else f" {activation.name}"


def _step(step: Step) -> str:
    flag = "" if step.flag < 0 else f"  [flag {step.flag}]"
    return _what(step) + flag


def _what(step: Step) -> str:
    match step:
        case Load():
            return f"load tensor {step.tensor} -> {_map(step.target)}"
        case Store():
            return f"store {_map(step.source)} -> tensor {step.tensor}"
        case Stage():
            norm = " normalised" if step.scale >= 0 else ""
            return f"stage{norm}{_activation(step.activation)} {_map(step.source)} -> {_map(step.target)}"
        case Convolve():
            moments = ", moments" if step.moments >= 0 else ""
            return f"convolve {_kernel(step)} {_map(step.x)} -> {_map(step.y)}{moments}"
        case ConvolveBackward():
            into = f" -> dx {_map(step.dx)}" if step.needs_input else ""
            return f"convolve backward {_kernel(step)} {_map(step.x)}, {_terms(len(step.terms))}{into}"
        case Pool():
            kind = "max" if step.is_max else "average"
            return f"{kind} pool {step.kernel_h}x{step.kernel_w} {_map(step.x)} -> {_map(step.y)}"
        case PoolBackward():
            kind = "max" if step.is_max else "average"
            return f"{kind} pool backward, {_terms(len(step.terms))} -> {_map(step.dx)}"
        case Combine():
            sign = "+=" if step.adds else "="
            terms = _terms(len(step.terms))
            return f"combine {_map(step.target)} {sign}{_activation(step.activation)} {terms}"
        case Reduce():
            return f"reduce {_map(step.gradient)} with {len(step.terms)} maps"
        case Unstage():
            return f"unstage{_activation(step.activation)} {_map(step.gradient)} -> {_map(step.target)}"
        case Mask():
            return f"mask{_activation(step.activation)} {_map(step.gradient)}"
        case Gate():
            sign = "+=" if step.adds else "="
            return f"gate {_map(step.target)} {sign} {_map(step.image)} * {_map(step.gate)}"
        case GateGradient():
            return f"gate gradient {_map(step.gradient)} with {_map(step.image)} -> {_map(step.target)}"
        case Pick():
            return f"pick {step.count} channels {_map(step.source)} -> {_map(step.target)}"


def label(operation: Any) -> str:
    """What an operation is, and the shapes it works on, without places: equal for steps that cost the
    same."""
    text = _what(operation) if isinstance(operation, Step) else type(operation).__name__
    return re.sub(r"(slab|scratch)\+\d+ |tensor \d+", "", text).strip()


def _kernel(step: Convolve | ConvolveBackward) -> str:
    parts = []
    if step.depthwise_taps:
        parts.append(f"{len(step.depthwise_taps)} taps depthwise")
    if step.taps:
        parts.append(f"{len(step.taps)} taps dense" if len(step.taps) > 1 else "pointwise")
    stride = "" if (step.stride_h, step.stride_w) == (1, 1) else f" stride {step.stride_h}x{step.stride_w}"
    return " + ".join(parts) + stride


def _terms(count: int) -> str:
    return f"{count} term{'s' if count != 1 else ''}"
