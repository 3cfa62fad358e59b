"""Convolutions of a plan, forward and backward, against the reference in fp64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch

from nascompile.kernels.plan import reference
from nascompile.kernels.plan.program import Phase
from nascompile.kernels.plan.state import State
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Convolve,
    ConvolveBackward,
    Grid,
    Map,
    Stage,
    Step,
    Tap,
    Term,
)
from tests.kernels.plan_memory import Memory, instruction_set, same

__all__ = ["instruction_set"]
pytestmark = pytest.mark.usefixtures("instruction_set")


@dataclass(frozen=True)
class Case:
    """A convolution: `kind` is "depthwise", "dense" or "separable"; the padding is half the kernel."""

    kind: str
    inputs: int = 16
    outputs: int = 16
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: int = 1
    pixel: int = 0
    terms: int = 1
    constant: bool = False
    adds: int = 0
    images: int = 3
    chunks: int = 2

    @property
    def padding(self) -> tuple[int, int]:
        return self.kernel[0] // 2 * self.dilation, self.kernel[1] // 2 * self.dilation


CASES = (
    *(Case(kind) for kind in ("depthwise", "dense", "separable")),
    *(Case(kind, stride=(2, 2), size=(11, 8), constant=True) for kind in ("depthwise", "dense", "separable")),
    *(Case("depthwise", kernel=(5, 5), size=(6, width), inputs=24) for width in range(1, 14, 3)),
    *(Case("separable", inputs=40, outputs=24, size=(5, width), terms=3) for width in range(2, 14, 3)),
    *(Case("dense", inputs=24, outputs=40, size=(3, width), adds=1) for width in range(1, 14, 4)),
    Case("depthwise", kernel=(5, 5), dilation=2, size=(13, 12), pixel=96, adds=1, terms=6, constant=True),
    Case("depthwise", kernel=(7, 7), stride=(2, 2), inputs=48, images=1),
    Case("depthwise", kernel=(1, 3), stride=(1, 2), adds=1),
    Case("depthwise", size=(2, 300)),
    Case("separable", kernel=(5, 5), stride=(2, 2), outputs=48, pixel=64, adds=1, terms=5, size=(12, 13)),
    Case("separable", dilation=2, inputs=64, outputs=64, size=(8, 8), constant=True),
    Case("separable", inputs=8, outputs=8, size=(33, 20), images=5, chunks=1),
    Case("dense", kernel=(1, 1), inputs=64, outputs=16, size=(20, 17), pixel=80, terms=4),
    Case("dense", kernel=(1, 1), stride=(2, 2), inputs=32, outputs=56, size=(7, 5)),
    Case("dense", kernel=(7, 7), stride=(2, 2), inputs=8, outputs=32, size=(15, 14), adds=1),
    Case("dense", kernel=(3, 1), inputs=16, outputs=24, stride=(2, 1), images=1),
    *(Case("separable", size=(5, width), terms=2, constant=True) for width in (8, 16, 24, 32)),
    *(Case("separable", inputs=n, outputs=n, size=(3, 8), terms=2, adds=1) for n in (32, 48, 64)),
    *(Case("dense", kernel=(1, 1), outputs=n, size=(4, 24), terms=2, adds=1) for n in (16, 48)),
    Case("dense", size=(4, 16), terms=2, adds=1, constant=True),
    Case("dense", terms=0, size=(1, 1)),
    Case("depthwise", terms=0, constant=True, size=(1, 1)),
)


def taps(map: Map, case: Case) -> tuple[Tap, ...]:
    """The taps of a case's kernel, centred on the pixels of `map`."""
    rows, columns = case.kernel
    above, before = case.padding
    return tuple(
        Tap((i * case.dilation - above) * map.row + (j * case.dilation - before) * map.pixel, i * columns + j)
        for i in range(rows)
        for j in range(columns)
    )


def grids(padded: Map, case: Case) -> tuple[Grid, ...]:
    """For every remainder of a pixel by the stride the taps that reach it."""
    (height, width), (down, across) = case.size, case.stride
    found = []
    for top in range(min(down, height)):
        for left in range(min(across, width)):
            reached = []
            for tap in range(case.kernel[0] * case.kernel[1]):
                i, j = divmod(tap, case.kernel[1])
                row = top + case.padding[0] - i * case.dilation
                column = left + case.padding[1] - j * case.dilation
                if row % down == 0 and column % across == 0:
                    reached.append(Tap(row // down * padded.row + column // across * padded.pixel, tap))
            rows, columns = -(-(height - top) // down), -(-(width - left) // across)
            found.append(Grid(top, left, down, across, rows, columns, tuple(reached)))
    return tuple(found)


class Made:
    """The memory and the steps of a case."""

    def __init__(self, case: Case) -> None:
        memory = self.memory = Memory(case.images, case.chunks)
        outputs = case.inputs if case.kind == "depthwise" else case.outputs
        size = tuple(-(-length // step) for length, step in zip(case.size, case.stride, strict=True))
        assert len(size) == 2
        margin = 6
        self.x = memory.filled(case.inputs, case.size, pixel=case.pixel)
        padded_x = memory.map(case.inputs, case.size, pixel=case.pixel, margin=margin, scratch=True)
        self.y = memory.map(outputs, size, pixel=case.pixel)
        memory.view(self.y).fill_(0)
        inputs, outputs = self.x.channels, self.y.channels

        spatial = taps(padded_x, case) if case.kind != "dense" else ()
        mixing = {"dense": taps(padded_x, case), "separable": (Tap(0, 0),), "depthwise": ()}[case.kind]
        dense = torch.randn(len(mixing), inputs, outputs)
        depthwise_weights = memory.vector(torch.randn(len(spatial) * inputs))
        weights = memory.vector(dense.flatten())
        transposed = memory.vector(dense.transpose(1, 2).flatten())
        self.moments = memory.summed(2 * outputs)
        stage = Stage(self.x, NONE, NONE, Activation.none, padded_x)
        forward = (padded_x, self.y, *case.stride, spatial, depthwise_weights, mixing, weights)
        self.forward = (stage, Convolve(*forward, self.moments))

        off = memory.flag(0)
        terms = tuple(
            Term(
                memory.filled(outputs, size, pixel=64 * (k % 2)),
                NONE if k == 1 else memory.random(outputs),
                off if k == 2 else NONE,
            )
            for k in range(case.terms)
        )
        constant = memory.random(outputs) if case.constant else NONE
        padded = memory.map(inputs if spatial else outputs, size, margin=margin, scratch=True)
        dx = memory.map(case.inputs, case.size, pixel=case.pixel, scratch=True)
        before = memory.filled(case.inputs, case.size)
        self.dx = memory.map(case.inputs, case.size)
        memory.view(self.dx).fill_(0)
        self.depthwise_gradient, self.gradient = 0, len(spatial) * inputs
        memory.gradients = self.gradient + dense.numel()
        self.backward = ConvolveBackward(
            *(padded_x, *size, outputs, *case.stride, spatial, depthwise_weights, mixing, transposed),
            *(terms, constant, padded, grids(padded, case), dx, 1, case.adds),
            self.depthwise_gradient if spatial else NONE,
            self.gradient if mixing else NONE,
        )
        # dx lies in scratch: something to add to, and a place where the test can read it
        self.first = (stage, Combine((Term(before, NONE, NONE),), NONE, Activation.none, dx, 0, NONE))
        self.last = (Combine((Term(dx, NONE, NONE),), NONE, Activation.none, self.dx, 0, NONE),)

    def compare(self, steps: Iterable[Step]) -> None:
        """Run steps in C++ and by the reference in fp64; the slab, the gradients and the sums must agree."""
        memory = self.memory
        phase = Phase((), tuple(steps))
        program = memory.program(phase)
        state = State(program, memory.slab.double(), torch.tensor(memory.flags), memory.tensors)
        for step in phase.steps:
            reference.RUN[type(step)](state, step)
        memory.run(phase)
        same(memory.slab, state.slab, 5e-6)
        size = memory.work.numel() // memory.chunks
        start = -(-2 * memory.sums // 16) * 16
        chunks = [
            memory.work[k * size + start : k * size + start + memory.gradients].double()
            for k in range(memory.chunks)
        ]
        same(torch.stack(chunks).sum(0), state.gradients, 5e-6)
        same(memory.read_sums(0, memory.sums), state.sums.plain, 5e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolve(case):
    torch.manual_seed(0)
    made = Made(case)
    made.compare(made.forward)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolve_backward(case):
    torch.manual_seed(0)
    made = Made(case)
    made.compare((*made.first, made.backward, *made.last))


@pytest.mark.parametrize("kind", ["depthwise", "dense", "separable"])
@pytest.mark.parametrize("wanted", range(7))
def test_gradients_that_are_not_needed_stay_as_they_are(kind, wanted):
    torch.manual_seed(0)
    made = Made(Case(kind, terms=2))
    step = replace(
        made.backward,
        needs_input=wanted & 1,
        depthwise_gradient=made.backward.depthwise_gradient if wanted & 2 else NONE,
        gradient=made.backward.gradient if wanted & 4 else NONE,
    )
    made.compare((*made.first, step, *made.last))


def test_a_grid_without_taps_is_zero():
    torch.manual_seed(0)
    for kind in ("depthwise", "dense"):
        made = Made(Case(kind, kernel=(1, 1), stride=(2, 2), terms=2))
        assert sum(not grid.taps for grid in made.backward.grids) == 3
        made.compare((*made.first, made.backward, *made.last))


@pytest.mark.parametrize("kind", ["depthwise", "dense", "separable"])
def test_variance_far_from_zero(kind):
    """The moments of a channel whose mean is a thousand times its deviation."""
    torch.manual_seed(0)
    made = Made(Case(kind, size=(24, 20), kernel=(1, 1), images=2, chunks=1))
    memory, channels = made.memory, made.y.channels
    memory.view(made.x).mul_(1e-3).add_(1)
    memory.run_steps(*made.forward)
    y = memory.view(made.y).double()
    count = y.numel() // channels
    total, squares = memory.read_sums(made.moments, 2 * channels).view(2, channels)
    # of what is stored, so that the rounding of y does not count
    same((squares / count - (total / count) ** 2).log(), y.var((0, 2, 3), correction=0).log(), 1e-3)
