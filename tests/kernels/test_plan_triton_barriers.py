"""Barrier operations of plans on a GPU: each in Triton against the reference in fp64.

test_other_processes.py runs these tests in the interpreter; without it and a GPU they are skipped.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nascompile.kernels.plan.program import Phase
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Coefficients,
    Combine,
    DecisionGradient,
    Normalise,
    NormaliseBackward,
    PackDense,
    PackDepthwise,
    Reduce,
    Term,
    UnpackDense,
    UnpackDepthwise,
    Upstream,
    Weighted,
)
from tests.kernels.plan_memory import Memory
from tests.kernels.plan_triton import SEGMENTS, compare, wide_lanes

__all__ = ["wide_lanes"]


def test_weights_are_packed_and_unpacked():
    memory = Memory(images=2)
    off = memory.flag(0)
    outs = ((0, 5, 2), (5, 1, 9))
    depthwise, dense = memory.tensor(torch.randn(7, 1, 3, 2)), memory.tensor(torch.randn(6, 7, 1, 3))
    found = memory.tensor(torch.zeros(7, 1, 3, 2)), memory.tensor(torch.zeros(6, 7, 1, 3))
    packed, forwards, transposed = (memory.take(count) for count in (6 * 16, 768, 768))
    memory.gradients = 6 * 16 + 768
    packs = (
        PackDense(dense, 3, SEGMENTS, outs, 16, 16, forwards, transposed),
        PackDense(dense, 3, SEGMENTS, outs, 16, 16, forwards, NONE),
        PackDepthwise(depthwise, 6, SEGMENTS, 16, packed),
        PackDepthwise(depthwise, 6, SEGMENTS, 16, packed, off),
    )
    unpacks = (
        UnpackDepthwise(0, 6, SEGMENTS, 16, found[0]),
        UnpackDense(6 * 16, 3, SEGMENTS, outs, 16, 16, found[1]),
        UnpackDense(6 * 16, 3, SEGMENTS, outs, 16, 16, dense, off),
    )
    compare(memory, Phase(packs, ()), Phase(unpacks, ()))


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("momentum", [0.3, -1.0])
@pytest.mark.parametrize("affine", [False, True])
def test_normalise_and_back(batch, momentum, affine):
    memory = Memory(images=2)
    off, on = memory.flag(0), memory.flag(1)
    y, gradients = memory.filled(16, (3, 5)), [memory.filled(16, (3, 5)) for _ in range(3)]
    padding = [7 + c for c in range(9)]
    for place in (y, *gradients):
        memory.view(place)[:, padding] = 0
    segments = ((0, 7, 0),)
    channels, elements = 16, 2 * 15
    moments = memory.summed(2 * channels)
    vectors, unused = memory.take(4 * channels), memory.take(4 * channels)
    numbers = tuple(memory.tensor(torch.rand(7) + 0.5) if affine else NONE for _ in range(4))
    gamma, beta, mean, var = numbers
    counter = memory.tensor(torch.tensor(4))
    decision = memory.tensor(torch.rand(3))
    normalise = Normalise(
        *(
            moments if batch else NONE,
            elements,
            1e-3,
            momentum,
            *(gamma, beta, mean, var),
            counter,
            segments,
            channels,
            vectors,
        )
    )
    sums = [(memory.summed(channels), memory.summed(channels)) for _ in gradients]
    measure = Combine((Term(y, NONE, NONE),), NONE, Activation.none, y, 0, moments)
    reduce = [Reduce(g, (Term(y, at[1], NONE),), at[0]) for g, at in zip(gradients, sums, strict=True)]
    outs = [memory.take(channels) for _ in gradients]
    upstream = tuple(
        Upstream(weight, *at, out, flag)
        for weight, at, out, flag in zip((0, NONE, 2), sums, outs, (on, NONE, off), strict=True)
    )
    by_y, constant, other_y, other_constant = (memory.take(channels) for _ in range(4))
    gammas, betas = (memory.tensor(torch.rand(7)) for _ in range(2))
    back = NormaliseBackward(
        *(
            vectors,
            elements if batch else 0,
            upstream,
            decision,
            by_y,
            constant,
            1,
            *(gammas, betas),
            segments,
            channels,
        )
    )
    terms = (
        Weighted(1, vectors + 32, vectors + 48, memory.take(channels), on),
        Weighted(NONE, NONE, NONE, memory.take(channels), NONE),
        Weighted(0, unused, unused, memory.take(channels), off),
    )
    amounts = memory.tensor(torch.rand(3))
    decided = DecisionGradient(1, sums[0][0], sums[0][1], vectors + 32, vectors + 48, channels, amounts)
    compare(
        memory,
        Phase((), (measure,)),
        Phase(
            (
                normalise,
                # the same running statistics a second time
                normalise,
                replace(normalise, out=unused, flag=off),
                Coefficients(terms, decision, memory.take(channels), channels),
                Coefficients(terms[1:2], NONE, NONE, channels),
            ),
            tuple(reduce),
        ),
        Phase(
            (
                back,
                # a second one of the same y, and one that nothing reaches
                replace(back, upstream=upstream[:1], starts=0),
                replace(back, vectors=unused, upstream=upstream[2:], starts=0),
                replace(back, vectors=unused, upstream=upstream[2:], by_y=other_y, constant=other_constant),
                decided,
                replace(decided, weight=2, scale=NONE, shift=NONE, sum_g=NONE),
                decided,
                replace(decided, flag=off),
            ),
            (),
        ),
        tolerance=2e-5,
    )
