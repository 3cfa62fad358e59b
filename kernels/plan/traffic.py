"""Bytes that the steps of a plan have to move at least, their FLOPs, and the launches on a GPU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any

from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.steps import (
    STEPS,
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
    Store,
    Term,
    Unstage,
)
from nascompile.kernels.plan.triton_table import lower


@dataclass(slots=True)
class Traffic:
    """What a kernel does in all its launches; a map counts once for each record that reads or writes it."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __iadd__(self, other: Traffic) -> Traffic:
        self.launches += other.launches
        self.bytes += other.bytes
        self.flops += other.flops
        return self


def count(program: Program) -> dict[str, Traffic]:
    """By the kernel's name, on a GPU; of barrier operations and the sums of partial sums, which are small,
    launches only. ValueError where a GPU cannot carry out the program."""
    found: defaultdict[str, Traffic] = defaultdict(Traffic)
    for launch in lower(program).launches:
        found[launch.kernel] += Traffic(1)
    for phase in program.phases:
        for step in phase.steps:
            for kernel, floats, flops in _parts(step):
                found[kernel] += Traffic(0, 4 * program.images * floats, program.images * flops)
    return dict(found)


def cost(operation: Any) -> tuple[int, int]:
    """FLOPs and bytes of one step for one image; nothing for barrier operations, which are small."""
    parts = _parts(operation) if isinstance(operation, STEPS) else []
    return sum(flops for _, _, flops in parts), 4 * sum(floats for _, floats, _ in parts)


def memory(operation: Any) -> int:
    """Bytes that a step moves between memory and cache for one image: maps in the slab, each once. Scratch is
    one image large, and stays in the cache."""
    if not isinstance(operation, STEPS):
        return 0
    found: set[Map] = set()
    for field in fields(operation):
        value = getattr(operation, field.name)
        terms = [term.map for term in value if isinstance(term, Term)] if isinstance(value, tuple) else []
        found.update(place for place in (value, *terms) if isinstance(place, Map))
    return 4 * sum(_size(place) for place in found if place.space != Space.scratch)


def _size(place: Map) -> int:
    return place.height * place.width * place.channels


def _parts(step: Any) -> list[tuple[str, int, int]]:
    """(kernel, floats, FLOPs) for one image."""
    if isinstance(step, Load):
        return [("load", (2 + step.adds) * _size(step.target), 0)]
    if isinstance(step, Store):
        return [("store", 2 * _size(step.source), 0)]
    if isinstance(step, Stage):
        return [("stage", 2 * _size(step.target), 0)]
    if isinstance(step, Combine):
        size = _size(step.target)
        return [("combine", (len(step.terms) + 1 + step.adds) * size, 2 * len(step.terms) * size)]
    if isinstance(step, Reduce):
        size = _size(step.gradient)
        return [("reduce", (len(step.terms) + 1) * size, 2 * (len(step.terms) + 1) * size)]
    if isinstance(step, Unstage):
        return [("unstage", (3 + step.adds) * _size(step.target), 0)]
    if isinstance(step, Mask):
        return [("mask", 3 * _size(step.gradient), 0)]
    if isinstance(step, Pick):
        return [("pick", _size(step.source) + (1 + step.adds) * _size(step.target), 0)]
    if isinstance(step, Gate):
        size = _size(step.target)
        return [("gate", _size(step.image) + _size(step.gate) + (1 + step.adds) * size, size)]
    if isinstance(step, GateGradient):
        size = _size(step.gradient)
        return [("gate_gradient", 2 * size + 2 * _size(step.target), 2 * size)]
    if isinstance(step, Pool):
        return [("pool", _size(step.x) + _size(step.y), 0)]
    if isinstance(step, PoolBackward):
        y, dx = _size(step.tile), _size(step.dx)
        return [("combine", (len(step.terms) + 1) * y, 0), ("pool_backward", y + 2 * dx, 0)]
    if isinstance(step, Convolve):
        return [_convolve(step)]
    assert isinstance(step, ConvolveBackward)
    return _convolve_backward(step)


def _convolve(step: Convolve) -> tuple[str, int, int]:
    pixels, inputs = step.y.height * step.y.width, step.x.channels
    flops = 2 * pixels * inputs * (len(step.depthwise_taps) + len(step.taps) * step.y.channels)
    kernel = "depthwise" if not step.taps else "separable" if step.depthwise_taps else "dense"
    return kernel, _size(step.x) + _size(step.y), flops


def _convolve_backward(step: ConvolveBackward) -> list[tuple[str, int, int]]:
    pixels, inputs, outputs = step.y_height * step.y_width, step.x.channels, step.y_channels
    x, y = _size(step.x), pixels * outputs
    spatial = 2 * pixels * inputs * len(step.depthwise_taps)
    dense = 2 * pixels * inputs * outputs * len(step.taps)
    found = [("combine", (len(step.terms) + 1) * y, 2 * len(step.terms) * y)]
    if step.taps:
        found.append(("dense_gradient", x + y, dense + spatial))
    middle = y
    if step.depthwise_taps and step.taps:
        middle = pixels * inputs
        found.append(("dense", y + middle, dense))
    if step.depthwise_taps:
        found.append(("depthwise_gradient", x + middle, spatial))
    if step.needs_input:
        kernel = "depthwise" if step.depthwise_taps else "dense"
        found.append((kernel, middle + (1 + step.adds) * x, spatial if step.depthwise_taps else dense))
    return found
