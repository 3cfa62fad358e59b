"""Plans on a GPU: every step and barrier operation in Triton against the reference in fp64.

test_other_processes.py runs these tests in the interpreter; without it and a GPU they are skipped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nascompile.kernels.plan import cuda
from nascompile.kernels.plan.program import Phase
from nascompile.kernels.plan.reference import ACTIVATIONS
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Gate,
    GateGradient,
    Load,
    Mask,
    Pick,
    Pool,
    PoolBackward,
    Reduce,
    Stage,
    Store,
    Term,
    Unstage,
)
from tests.kernels.plan_memory import Memory, empty, strides
from tests.kernels.plan_triton import DEVICE, SEGMENTS, compare_steps, run_steps, wide_lanes
from tests.kernels.test_plan_convolve import Case, Made

__all__ = ["wide_lanes"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_load_and_store(layout):
    memory = Memory(images=2)
    tensor = torch.randn(2, 7, 3, 5).contiguous(memory_format=layout)
    target = memory.filled(32, (3, 5), pixel=48)
    other = memory.map(16, (3, 5))
    result = torch.zeros(2, 7, 3, 5).contiguous(memory_format=layout)
    off = memory.flag(0)
    source, out = memory.tensor(tensor), memory.tensor(result)
    compare_steps(
        memory,
        Load(*(source, *strides(tensor), ((3, 4, 1), (0, 3, 20)), target, 1)),
        Load(*(source, *strides(tensor), SEGMENTS, other, 0)),
        Load(*(source, *strides(tensor), SEGMENTS, target, 0, off)),
        Store(*(out, *strides(result), SEGMENTS, other)),
        Store(*(out, *strides(result), SEGMENTS, target, off)),
    )
    assert torch.equal(memory.tensors[out], tensor)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("affine", [False, True])
def test_stage_and_back(activation, affine):
    memory = Memory(images=2)
    source = memory.filled(32, (5, 4), pixel=64)
    scale, shift = (memory.random(32) if affine else NONE for _ in range(2))
    staged = memory.map(32, (5, 4), margin=2, scratch=True)
    seen, gradient, target = memory.map(32, (5, 4)), memory.filled(32, (5, 4)), memory.filled(32, (5, 4))
    first, second = memory.summed(64), memory.summed(64)
    memory.view(source)[0, :, 0, 0] = torch.nan
    memory.view(source)[1, :, 0, :3] = torch.tensor([0.0, 6.0, 9.0])
    off = memory.flag(0)
    unstage = Unstage(gradient, source, scale, shift, activation, target, 1, NONE)
    compare_steps(
        memory,
        Stage(source, scale, shift, activation, staged),
        Stage(source, NONE, NONE, Activation.none, staged, off),
        Combine((Term(staged, NONE, NONE),), NONE, Activation.none, seen, 0, NONE),
        unstage,
        replace(unstage, moments=first, flag=off),
    )
    memory.view(source)[0, :, 0, 0] = 1.0
    compare_steps(memory, replace(unstage, moments=second, adds=0))


ENDS = (0.0, 1e-30, 1e-9, 1e-4, 0.3, 0.4, 3.0, 6.0, 14.0, 88.5, 104.0, 1e4, 1e20, 3e37, torch.inf, torch.nan)


# the interpreter computes in NumPy, which says what it meets
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("activation", list(Activation))
def test_activations_at_the_ends_of_the_numbers(activation):
    memory = Memory(images=1)
    source, gradient = memory.filled(32, (1, 1)), memory.filled(32, (1, 1))
    forward, backward = memory.filled(32, (1, 1)), memory.filled(32, (1, 1))
    values = torch.tensor([sign * value for value in ENDS for sign in (1.0, -1.0)])
    memory.view(source).copy_(values.view(1, -1, 1, 1))
    memory.view(gradient).fill_(1.0)
    exact = values.double().requires_grad_()
    expected = ACTIVATIONS[activation](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    run_steps(
        memory,
        Combine((Term(source, NONE, NONE),), NONE, activation, forward, 0, NONE),
        Unstage(gradient, source, NONE, NONE, activation, backward, 0, NONE),
    )
    known, near = ~values.isnan(), activation in (Activation.sigmoid, Activation.silu, Activation.gelu)
    for place, right in ((forward, expected.detach()), (backward, slope)):
        found = memory.view(place).flatten().double()
        # at nan the kernels of torch for the two kinds of processors differ
        tolerance = {"rtol": 2e-6, "atol": 4e-7 if near else 1e-36, "equal_nan": True}
        assert torch.allclose(found[known], right[known], **tolerance)


def test_mask():
    memory = Memory(images=2)
    gradient, other = memory.filled(48, (3, 3), pixel=96), memory.filled(48, (3, 3))
    value = memory.filled(48, (3, 3))
    memory.view(value)[0, :, 0, :2] = torch.tensor([0.0, 6.0])
    compare_steps(
        memory,
        Mask(gradient, value, Activation.relu),
        Mask(other, value, Activation.relu6),
        Mask(other, value, Activation.relu, memory.flag(0)),
    )


@pytest.mark.parametrize("size", [(7, 8), (1, 1)])
def test_gate_and_back(size):
    memory = Memory(images=2)
    image, other = memory.filled(32, size, pixel=48), memory.filled(32, size)
    single, target, gradient = memory.filled(32, (1, 1)), memory.filled(32, size), memory.filled(32, (1, 1))
    off, first, second = memory.flag(0), memory.summed(64), memory.summed(64)
    compare_steps(
        memory,
        Gate(image, single, target, 0, first),
        Gate(image, other, target, 1, second),
        GateGradient(target, image, gradient),
        Gate(image, single, target, 0, NONE, off),
        GateGradient(target, image, gradient, off),
    )


def test_pick():
    memory = Memory(images=2)
    source, wide = memory.filled(16, (3, 5)), memory.filled(32, (3, 5), pixel=48)
    pick = Pick(source, wide, 1, 2, 3, 4, 7, 0)
    compare_steps(
        memory,
        pick,
        replace(pick, adds=1, first_source=0, step_source=1, first_target=16, step_target=1),
        Pick(wide, source, 4, 1, 0, 1, 5, 1),
        # one channel for many, and many for one
        Pick(source, wide, 2, 0, 3, 1, 14, 0),
        Pick(wide, source, 5, 1, 7, 0, 20, 1),
        replace(pick, flag=memory.flag(0)),
    )


@pytest.mark.parametrize("activation", list(Activation))
def test_combine(activation):
    memory = Memory(images=2)
    off, on = memory.flag(0), memory.flag(1)
    terms = [
        Term(memory.filled(16, (7, 8)), NONE, NONE),
        Term(memory.filled(16, (7, 8), pixel=48), memory.random(16), on),
        Term(memory.map(16, (7, 8)), memory.take(16), off),
    ]
    targets = [memory.filled(16, (7, 8), pixel=32) for _ in range(4)]
    first, second, third = (memory.summed(32) for _ in range(3))
    compare_steps(
        memory,
        Combine(tuple(terms), memory.random(16), activation, targets[0], 0, first),
        Combine(tuple(terms[:2]), NONE, activation, targets[1], 1, second),
        Combine((), NONE, activation, targets[2], 0, NONE),
        Combine((), NONE, activation, targets[3], 0, third, off),
        # a second step that adds to the same sums, and one in scratch
        Combine(tuple(terms[:1]), NONE, activation, targets[2], 0, first),
    )


def test_reduce():
    memory = Memory(images=2)
    off = memory.flag(0)
    gradient = memory.filled(32, (8, 8), pixel=64)
    places = [memory.filled(32, (8, 8)) for _ in range(3)]
    sums = [memory.summed(32) for _ in range(5)]
    terms = [Term(place, at, NONE) for place, at in zip(places, sums, strict=False)]
    terms[1] = replace(terms[1], flag=off)
    compare_steps(
        memory,
        Reduce(gradient, tuple(terms), sums[3]),
        Reduce(gradient, (replace(terms[0], coefficient=sums[4]),), NONE),
        Reduce(gradient, tuple(terms), sums[3], off),
    )


POOLS = (
    # size, kernel, stride, padding, counts_padding
    ((8, 8), (3, 3), (1, 1), (1, 1), 0),
    ((8, 7), (3, 3), (2, 2), (1, 1), 1),
    ((5, 6), (2, 3), (2, 1), (0, 1), 0),
    ((4, 4), (4, 4), (1, 1), (0, 0), 0),
)


@pytest.mark.parametrize("is_max", [0, 1])
@pytest.mark.parametrize("pool", POOLS)
def test_pool_and_back(pool, is_max):
    size, kernel, stride, padding, counts = pool
    memory = Memory(images=2)
    off = memory.flag(0)
    sizes = [(size[k] + 2 * padding[k] - kernel[k]) // stride[k] + 1 for k in range(2)]
    out = sizes[0], sizes[1]
    x = memory.filled(32, size, pixel=48)
    memory.view(x)[1] = memory.view(x)[1].round()
    y = memory.map(32, out, pixel=48)
    memory.view(y).zero_()
    image = out[0] * out[1] * 8
    index = memory.take(memory.images * image) if is_max else NONE
    window: Any = (is_max, *kernel, *stride, *padding, counts, index, image)
    tile, dx = memory.map(32, out, scratch=True), memory.filled(32, size)
    terms = (Term(memory.filled(32, out), memory.random(32), NONE), Term(y, NONE, off))
    make: Any = Pool
    step = make(x, y, *window, memory.summed(64))
    back = PoolBackward(terms, memory.random(32), tile, dx, *window)
    compare_steps(memory, step, back, replace(step, flag=off), replace(back, flag=off))


CASES = (
    Case("depthwise", images=2, size=(7, 5)),
    Case(
        "depthwise",
        images=2,
        kernel=(5, 5),
        dilation=2,
        size=(8, 8),
        pixel=96,
        adds=1,
        terms=3,
        constant=True,
    ),
    Case("depthwise", images=1, kernel=(3, 2), stride=(2, 2), inputs=32, size=(8, 7)),
    Case("dense", images=2, inputs=32, outputs=48, kernel=(1, 3), size=(3, 5), adds=1),
    Case("dense", images=2, kernel=(1, 1), stride=(2, 2), inputs=32, outputs=64, size=(7, 5)),
    Case("dense", images=2, stride=(2, 2), size=(8, 8), pixel=32, constant=True, terms=3),
    Case("separable", images=2, size=(8, 8), terms=3),
    Case(
        "separable", images=2, kernel=(5, 5), stride=(2, 2), outputs=48, pixel=64, size=(8, 7), constant=True
    ),
    Case("separable", images=1, dilation=2, inputs=64, outputs=32, size=(5, 8), adds=1),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolve(case):
    made = Made(case)
    compare_steps(made.memory, *made.forward, replace(made.forward[1], flag=made.memory.flag(0)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolve_backward(case):
    made = Made(case)
    off = replace(made.backward, flag=made.memory.flag(0))
    # twice, as with shared weights: gradients are added up
    compare_steps(made.memory, *made.first, made.backward, off, made.backward, *made.last)


@pytest.mark.parametrize("left_out", ["dx", "depthwise_gradient", "gradient"])
def test_convolve_backward_leaves_out(left_out):
    made = Made(CASES[6])
    changes = {"needs_input": 0, "grids": ()} if left_out == "dx" else {left_out: NONE}
    compare_steps(made.memory, *made.first, replace(made.backward, **changes), *made.last)


def test_runs_repeat_bit_for_bit():
    made = Made(CASES[6])
    program = made.memory.program(Phase((), (*made.forward, *made.first, made.backward)))
    prepared = cuda.prepare(program, DEVICE)
    found = []
    for _ in range(2):
        work, slab = empty(prepared.work).to(DEVICE), made.memory.slab.to(DEVICE).clone()
        prepared.run(slab, work, torch.zeros(4, dtype=torch.uint8, device=DEVICE), [])
        found.append((slab, work))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_is_refused():
    memory = Memory(images=2)
    program = memory.program(Phase((), ()))
    with pytest.raises(ValueError, match="multiple of 8, the kernels need 16"):
        cuda.prepare(replace(program, lane=8), DEVICE)
    prepared = cuda.prepare(memory.program(Phase((), Made(CASES[0]).forward)), DEVICE)
    flags = torch.zeros(1, dtype=torch.uint8)
    slab = memory.slab.to(DEVICE)
    with pytest.raises(RuntimeError, match="work has 16 floats"):
        prepared.run(slab, empty(16).to(DEVICE), flags, [])
