"""A plan: the programs of a region, forward and backward, for one batch size, mode and set of wanted
gradients."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nascompile.compiler.region.backward import Backward
from nascompile.compiler.region.convolutions import make_stage
from nascompile.compiler.region.flags import Flags
from nascompile.compiler.region.forward import Forward
from nascompile.compiler.region.gradients import Wanted
from nascompile.compiler.region.ir import Graph, TensorRef, Value
from nascompile.compiler.region.memory import Buffer, lay_out, lay_out_images
from nascompile.compiler.region.scratch import Scratch
from nascompile.compiler.region.settings import Settings
from nascompile.compiler.region.storage import scale_and_shift
from nascompile.compiler.region.tasks import (
    Staged,
    Task,
    TaskList,
    in_phase,
    pack_at_once,
    pack_when_used,
    set_phases,
    touch,
    unpack_when_complete,
)
from nascompile.kernels.plan.program import Phase, Program, aligned, encode
from nascompile.kernels.plan.steps import NONE, Activation, Combine, Map, Term, Unstage


@dataclass(slots=True)
class Direction:
    """One program, how it is written down, and the tensors it takes, in order.

    `serves`: for every operation, phase by phase, barrier operations first, the values it is part of.
    """

    program: Program
    encoded: Tensor
    tensors: list[Any]
    serves: list[tuple[Value, ...]]
    work: int = 0
    """FLOPs of the convolutions for one image."""


@dataclass(slots=True)
class Plan:
    """The forward program, the backward program if there is one, and the memory they share.

    reached: for the backward program, the flag under which each gradient is there: TensorRef or ("input", i).
    whole: the parameters whose gradients it writes in all elements. slab: floats.
    """

    graph: Graph
    settings: Settings
    flags: Flags
    forward: Direction
    backward: Direction | None
    reached: dict[Any, int]
    whole: frozenset[TensorRef]
    slab: int


def build(graph: Graph, settings: Settings, wanted: Wanted | None) -> Plan:
    """The plan of a region. `wanted`: the gradients backward computes; None for no backward.

    Raises Unsupported where the region cannot be a plan.
    """
    with _no_collection():
        return _build(graph, settings, wanted)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Building makes many small objects, none of them garbage: looking for it takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _build(graph: Graph, settings: Settings, wanted: Wanted | None) -> Plan:
    flags = Flags()
    forward = Forward(graph, settings, flags)
    phases = set_phases(forward.tasks, late=False)
    # a GPU packs all at once, and keeps the gradients of all weights: a launch costs more than memory
    in_turn = settings.executor.in_turn and "reuse_memory" not in settings.without
    if in_turn:
        pack_when_used(forward.tasks.tasks)
    backward = None if wanted is None else Backward(forward, wanted)
    buffers, gradients = list(forward.buffers), list[Buffer]()
    # a thread of the CPU carries an image through all steps in their order
    one_phase = backward is None and phases == 1 and in_turn
    touch([] if one_phase else forward.tasks.tasks, 0)
    if backward is not None:
        set_phases(backward.tasks, late="gather_phases" not in settings.without)
        if in_turn:
            unpack_when_complete(backward.tasks.tasks)
        else:
            pack_at_once(backward.tasks.tasks)
        touch(backward.tasks.tasks, phases)
        buffers += backward.buffers
        gradients += backward.gradients.values()
    for buffer in [] if in_turn else gradients:
        buffer.first = 0
    if "reuse_memory" in settings.without:
        for buffer in buffers:
            buffer.first = 0
    if one_phase:
        _touch_in_turn(forward.tasks.tasks)
        slab = lay_out_images(buffers, settings.images)
    else:
        slab = lay_out(buffers)
    ahead = _emit(forward.tasks, settings, flags, forward.sums, 0, forward.tensors)
    back = None
    if backward is not None:
        size = lay_out(gradients)
        back = _emit(backward.tasks, settings, flags, backward.sums, size, backward.tensors)
    there = ({}, frozenset[TensorRef]()) if backward is None else (backward.reached, backward.whole)
    return Plan(graph, settings, flags, ahead, back, *there, slab)


def _touch_in_turn(tasks: Sequence[Task]) -> None:
    """Record in the buffers of a program of one phase by which of its steps they are used."""
    for turn, task in enumerate(in_phase(tasks)[1]):
        for what in (*task.reads, *task.writes):
            buffer = what[0] if isinstance(what, tuple) else what
            if isinstance(buffer, Buffer) and not buffer.is_vector:
                buffer.first = turn if buffer.last < 0 else buffer.first
                buffer.last = turn


def _emit(
    tasks: TaskList, settings: Settings, flags: Flags, sums: int, gradients: int, tensors: list[Any]
) -> Direction:
    scratch = Scratch(settings.executor.in_turn, settings.images)
    by_phase: defaultdict[int, list[Task]] = defaultdict(list)
    for task in tasks.tasks:
        by_phase[task.phase].append(task)
    phases = []
    serves: list[tuple[Value, ...]] = []
    for number in range(max(by_phase, default=-1) + 1):
        scratch.begin_phase()
        barriers, steps = in_phase(by_phase[number])
        serves += [(task.value,) for task in barriers]
        operations = _steps(steps, scratch, flags, serves)
        phases.append(Phase(tuple(task.make({}) for task in barriers), tuple(operations)))
    program = Program(
        tuple(phases),
        settings.images,
        settings.chunks,
        settings.lane,
        aligned(sums),
        aligned(gradients),
        aligned(scratch.floats),
    )
    work = sum(task.work for task in tasks.tasks)
    return Direction(program, encode(program), list(tensors), serves, work)


def _steps(
    tasks: Sequence[Task], scratch: Scratch, flags: Flags, serves: list[tuple[Value, ...]]
) -> list[Any]:
    """The steps of a phase: what reads one staged image stands together, after the step that stages it.

    Whom each serves is added to `serves`.
    """
    found: list[Any] = []
    first = len(serves)
    at = 0
    while at < len(tasks):
        end = at + 1
        staged, gather = tasks[at].staged, tasks[at].gather
        while (
            staged is not None
            and end < len(tasks)
            and (tasks[end].staged, tasks[end].gather) == (staged, gather)
        ):
            end += 1
        run = tasks[at:end]
        at = end
        maps: dict[str, Map] = {}
        if staged is not None:
            maps["x"] = _stage(staged, run, scratch, flags, found)
        gathered = None if gather is None else _begin_gather(staged, run, scratch, flags, found)
        together = tuple(task.value for task in run)
        serves += [together] * (first + len(found) - len(serves))
        for number, task in enumerate(run):
            own = {
                name: scratch.get(name, channels, height, width, border)
                for name, channels, height, width, border in task.scratch
            }
            if gathered is not None:
                own["dx"] = gathered.places[number % len(gathered.places)]
            made = task.make({**maps, **own})
            made = made if isinstance(made, tuple) else (replace(made, flag=task.flag),)
            if gathered is not None and gathered.is_written:
                made = tuple(replace(step, adds=0) for step in made)
            found += made
            serves += [(task.value,)] * len(made)
        if gathered is not None:
            assert staged is not None
            _end_gather(staged, run, gathered, flags, found)
            serves += [together] * (first + len(found) - len(serves))
    return found


def _any(flags: Flags, run: Sequence[Task]) -> int:
    return flags.any_of(task.flag for task in run)


def _stage(staged: Staged, run: Sequence[Task], scratch: Scratch, flags: Flags, found: list[Any]) -> Map:
    source = staged.source
    if staged.is_direct:
        return source.map()
    size = (source.channels, source.height, source.width)
    target = scratch.get("x", *size, staged.border)
    found.append(make_stage(staged, target, _any(flags, run)))
    return target


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Where the gradients of a staged image go, which the tasks of a run take by turns, and under which flags
    something comes there. is_written: by one task each, which writes; else they are added to zeros."""

    places: list[Map]
    flags: list[int]
    is_written: bool


def _begin_gather(
    staged: Staged | None, run: Sequence[Task], scratch: Scratch, flags: Flags, found: list[Any]
) -> _Gathered:
    assert staged is not None
    source = staged.source
    places = scratch.several(len(run), "dx", source.channels, source.height, source.width)
    users = [_any(flags, run[number :: len(places)]) for number in range(len(places))]
    is_written = scratch.has_copies and len(places) == len(run)
    if not is_written:
        found += [
            Combine((), NONE, Activation.none, place, 0, NONE, flag=flag)
            for place, flag in zip(places, users, strict=True)
        ]
    return _Gathered(places, users, is_written)


def _end_gather(
    staged: Staged, run: Sequence[Task], gathered: _Gathered, flags: Flags, found: list[Any]
) -> None:
    gather = run[0].gather
    assert gather is not None
    gradient = gathered.places[0]
    if len(gathered.places) > 1:
        pairs = zip(gathered.places, gathered.flags, strict=True)
        parts = tuple(Term(place, NONE, flag) for place, flag in pairs)
        found.append(Combine(parts, NONE, Activation.none, gradient, 0, NONE, flag=_any(flags, run)))
    channels = staged.source.channels
    scale, shift = scale_and_shift(staged.vectors, channels)
    target = gather.target.map()
    found.append(
        Unstage(
            gradient,
            staged.source.map(),
            scale,
            shift,
            staged.activation,
            target,
            int(gather.adds),
            gather.moments,
            flag=_any(flags, run),
        )
    )
