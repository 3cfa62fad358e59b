"""Steps that share launches on a GPU give what they give one by one, bit for bit.

test_other_processes.py runs these tests in the interpreter; without it and a GPU they are skipped.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nascompile.kernels.plan import cuda, triton_launches
from nascompile.kernels.plan.program import Phase, Program
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Convolve,
    Gate,
    GateGradient,
    Map,
    Mask,
    Pick,
    Pool,
    PoolBackward,
    Reduce,
    Stage,
    Step,
    Tap,
    Term,
    Unstage,
)
from nascompile.kernels.plan.triton_areas import Area
from nascompile.kernels.plan.triton_schedule import Job
from tests.kernels import test_plan_convolve
from tests.kernels.plan_memory import Memory, empty
from tests.kernels.plan_triton import DEVICE, compare_steps, wide_lanes
from tests.kernels.test_plan_convolve import Case, Made

__all__ = ["wide_lanes"]
SIZE = (6, 5)


def launched(program: Program) -> Counter[str]:
    """How many launches of each kernel."""
    return Counter(launch.kernel for launch in cuda.prepare(program, DEVICE, "ieee").launches)


def carried_out(memory: Memory, program: Program) -> list[Tensor]:
    """Slab, sums and gradients afterwards, as whole numbers: nan equals nan."""
    prepared = cuda.prepare(program, DEVICE, "ieee")
    work, slab = empty(prepared.work).to(DEVICE), memory.slab.to(DEVICE).clone()
    flags = torch.tensor([*memory.flags, 0], dtype=torch.uint8)
    prepared.run(slab, work, flags, [])
    summed = work[: 2 * memory.sums + 16 + memory.gradients]
    return [tensor.view(torch.int32).cpu() for tensor in (slab, summed)]


def compare_with_one_by_one(memory: Memory, steps: list[Any], patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The launches together and one by one, which give the same."""
    program = memory.program(Phase((), tuple(steps)))
    together, count = carried_out(memory, program), launched(program).total()
    with patch.context() as alone:
        alone.setattr(triton_launches, "schedule", lambda jobs: [[job] for job in jobs])
        single, most = carried_out(memory, program), launched(program).total()
    assert all(torch.equal(found, expected) for found, expected in zip(together, single, strict=True))
    return count, most


def some_step(rng: random.Random, memory: Memory, places: list[Map], scratch: list[Map]) -> Step:
    """A step on maps of one size and 32 channels, or on the thirds of one of 96."""
    a, b, c, d = rng.choices(places, k=4)
    flag, adds = rng.choice([NONE, NONE, 0, 1]), rng.choice([0, 1])
    sums = rng.choice([NONE, memory.summed(64)])
    vector = rng.choice([NONE, memory.random(32)])
    activation = rng.choice([Activation.none, Activation.relu, Activation.sigmoid])
    terms = tuple(Term(place, memory.random(32), rng.choice([NONE, 0])) for place in (a, b))
    padded = rng.choice(scratch)
    taps = tuple(Tap(i * padded.row + j * padded.pixel, 0) for i in (-1, 0, 1) for j in (-1, 1))
    window: Any = (1, 3, 3, 1, 1, 1, 1, 0, NONE, NONE)
    without_padding: Any = (0, *window[1:])
    single = memory.filled(32, (1, 1))
    made: list[Any] = [
        Combine(terms, vector, activation, d, adds, sums),
        Combine((Term(padded, NONE, NONE),), NONE, activation, c, adds, NONE),
        Stage(a, vector, NONE, activation, padded),
        Stage(b, NONE, vector, activation, rng.choice(scratch)),
        Convolve(padded, c, 1, 1, taps, memory.random(32), (), NONE, sums),
        Reduce(a, tuple(Term(t.map, memory.summed(32), t.flag) for t in terms), memory.summed(32)),
        Unstage(a, b, vector, vector, activation, c, adds, sums),
        Mask(a, b, Activation.relu),
        Pick(a, b, 3, 1, 1, 2, 9, adds),
        Gate(a, single, b, adds, sums),
        GateGradient(a, b, single),
        Pool(a, c, *window, moments=sums),
        PoolBackward(terms[:1], NONE, scratch[-1], d, *without_padding),
    ]
    return replace(rng.choice(made), flag=flag)


def random_steps(seed: int) -> tuple[Memory, list[Any]]:
    """Memory, and steps that use its maps again and again."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    memory = Memory(images=2)
    for value in (0, 1):
        memory.flag(value)
    wide = memory.filled(96, SIZE)
    thirds = [replace(wide, offset=wide.offset + at, channels=32) for at in (0, 32, 64)]
    places = [*thirds, *(memory.filled(32, SIZE) for _ in range(3))]
    scratch = [memory.map(32, SIZE, margin=2, scratch=True) for _ in range(2)]
    scratch.append(memory.map(32, SIZE, scratch=True))
    first = [Stage(places[0], NONE, NONE, Activation.none, place) for place in scratch]
    return memory, [*first, *(some_step(rng, memory, places, scratch) for _ in range(28))]


@pytest.mark.parametrize("seed", range(12))
def test_random_steps(seed, monkeypatch):
    memory, steps = random_steps(seed)
    count, most = compare_with_one_by_one(memory, steps, monkeypatch)
    assert count < most


def floats_in(areas: Sequence[Area], name: str, floats: int) -> Tensor:
    """Which of so many floats of a memory are in one of the areas."""
    found = torch.zeros(floats, dtype=torch.bool)
    for area in areas:
        if area.memory == name:
            at = torch.arange(area.begin, min(area.end, floats))
            found[at if not area.step else at[(at - area.first) % area.step < area.count]] = True
    return found


def masks(memory: Memory, zeroed: int, work: int, areas: Sequence[Area]) -> list[Tensor]:
    """Which floats of slab and work memory are in the areas; every image has scratch of its own."""
    image = -(-memory.scratch // 16) * 16
    found = floats_in(areas, "work", work)
    for n in range(memory.images):
        start = zeroed - (memory.images - n) * image
        found[start : start + image] |= floats_in(areas, "scratch", image)
    return [floats_in(areas, "slab", memory.slab.numel()), found]


def check_areas(memory: Memory, steps: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Every record alone: it changes only what it says, and depends only on what it says."""
    jobs: list[Job] = []
    patch.setattr(triton_launches, "schedule", lambda some: [[job] for job in jobs.extend(some) or some])
    prepared = cuda.prepare(memory.program(Phase((), tuple(steps))), DEVICE, "ieee")
    under = prepared.under(torch.ones(4, dtype=torch.uint8))
    work = empty(prepared.work).copy_(torch.randn(prepared.work))
    before = [memory.slab.nan_to_num(0.5), work]
    for job, call in zip(jobs, under.calls, strict=False):
        known = masks(memory, prepared._zeroed, prepared.work, [*job.reads, *job.writes])
        written = masks(memory, prepared._zeroed, prepared.work, job.writes)
        # partial sums are anyone's
        written[1][prepared._zeroed :] = True
        results = []
        for shift in (0.0, 1.0):
            given = [torch.where(is_known, m, m + shift) for m, is_known in zip(before, known, strict=True)]
            given = [empty(m.numel()).copy_(m).to(DEVICE) for m in given]
            call((*given, under.table, under.flags, under.flags), memory.images)
            results.append([m.cpu().view(torch.int32) for m in given])
        for first, second, start, may in zip(*results, before, written, strict=True):
            changed = first != start.view(torch.int32)
            assert not (changed & ~may).any(), job.name
            assert torch.equal(first[changed], second[changed]), job.name


def made_in(memory: Memory, patch: pytest.MonkeyPatch, case: Case) -> Made:
    """A convolution in memory that it shares with others."""
    floats = memory.gradients
    with patch.context() as shared:
        shared.setattr(test_plan_convolve, "Memory", lambda *_: memory)
        made = Made(case)
    memory.gradients = max(floats, memory.gradients)
    return made


CASES = (
    Case("separable", inputs=32, outputs=64, size=(7, 5)),
    Case("separable", inputs=96, outputs=128, size=(4, 4), stride=(2, 2), constant=True, adds=1),
    Case("depthwise", inputs=96, size=(2, 3)),
    Case("depthwise", inputs=32, size=(9, 5), terms=3),
    Case("dense", inputs=32, outputs=192, size=(3, 3), kernel=(1, 1)),
    Case("dense", inputs=64, outputs=64, size=(8, 6), stride=(2, 2), kernel=(1, 1)),
)
"""Of many sizes and channels, so that grids of one launch differ in both axes."""


@pytest.mark.parametrize("places", [1 << 24, 1], ids=["own", "by turns"])
@pytest.mark.parametrize("takes_turns", [False, True])
def test_convolutions_of_different_sizes(takes_turns, places, monkeypatch):
    monkeypatch.setattr(triton_launches, "PLACES", places)
    memory = Memory(images=2)
    made, scratch = [], []
    for case in CASES:
        made.append(made_in(memory, monkeypatch, case))
        scratch.append(memory.scratch)
        if takes_turns:
            # the next one's padded images lie where this one's do
            memory.scratch = 0
    memory.scratch = max(scratch)
    steps: list[Any] = []
    for one in made:
        steps += [*one.forward, *one.first, one.backward, *one.last]
    count, most = compare_with_one_by_one(memory, steps, monkeypatch)
    assert count <= (most if takes_turns else most * 2 // 3)


@pytest.mark.parametrize("case", CASES[1::2], ids=str)
def test_convolutions_say_what_they_read_and_write(case, monkeypatch):
    memory = Memory(images=2)
    made = made_in(memory, monkeypatch, case)
    check_areas(memory, [*made.forward, *made.first, made.backward, *made.last], monkeypatch)


@pytest.mark.parametrize("seed", range(3))
def test_steps_say_what_they_read_and_write(seed, monkeypatch):
    memory, steps = random_steps(seed)
    check_areas(memory, steps, monkeypatch)


def test_own_places_make_fewer_launches(monkeypatch):
    memory = Memory(images=2)
    made = [made_in(memory, monkeypatch, CASES[0]) for _ in range(3)]
    program = memory.program(Phase((), tuple(step for one in made for step in (*one.first, one.backward))))
    own = launched(program)
    monkeypatch.setattr(triton_launches, "PLACES", 1)
    by_turns = launched(program)
    assert own["dense"] == own["dense_gradient"] == 1
    assert by_turns["dense"] == by_turns["dense_gradient"] == 3
    assert cuda.prepare(program, DEVICE).work < 4 * memory.scratch * memory.images + (1 << 16)


def test_gradients_of_weights_have_a_flag():
    made = Made(Case("separable", images=2, inputs=32, outputs=64))
    memory = made.memory
    off, on = memory.flag(0), memory.flag(1)
    steps = [replace(made.backward, gradient_flag=flag) for flag in (off, on)]
    compare_steps(memory, *made.first, *steps, *made.last)
    compare_steps(memory, *made.first, steps[0], *made.last)


def test_sizes_of_one_launch_differ():
    memory = Memory(images=2)
    steps: list[Any] = []
    for channels, size in ((32, (9, 9)), (96, (2, 3)), (160, (1, 1)), (32, (1, 2))):
        image, other = memory.filled(channels, size), memory.filled(channels, size)
        gate, target = memory.filled(channels, (1, 1)), memory.filled(channels, size)
        sums = [memory.summed(channels) for _ in range(4)]
        steps += [
            Combine((Term(image, NONE, NONE),), NONE, Activation.relu, target, 0, sums[0]),
            Reduce(image, (Term(other, sums[2], NONE),), sums[3]),
            GateGradient(image, other, gate),
        ]
    memory.summed(160)
    compare_steps(memory, *steps)
    found = launched(memory.program(Phase((), tuple(steps))))
    assert found["combine"] == found["reduce"] == found["gate_gradient"] == 1
