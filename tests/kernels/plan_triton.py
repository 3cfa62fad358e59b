"""Runs hand-built programs on the kernels for GPUs, and compares them with the reference in fp64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from nascompile.kernels import native
from nascompile.kernels.plan import barriers_reference, cuda, reference
from nascompile.kernels.plan.program import Phase, Program
from nascompile.kernels.plan.state import State
from nascompile.kernels.plan.steps import NONE, Pool
from tests.kernels import plan_memory
from tests.kernels.plan_memory import Memory, empty, same

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SEGMENTS = ((3, 4, 0), (0, 3, 5))
"""Seven channels in sixteen, in two parts, the second first."""


@pytest.fixture(autouse=True)
def wide_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels as on a GPU, wherever the kernels can run."""
    reason = cuda.why_not(DEVICE) or native.load()[1]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(plan_memory, "lane", lambda: cuda.LANE)


def compare(memory: Memory, *phases: Phase, tolerance: float = 5e-6) -> None:
    """Run phases in Triton and by the reference in fp64: slab, gradients, sums and tensors must agree."""
    program = memory.program(*phases)
    flags = torch.tensor([*memory.flags, 0], dtype=torch.uint8)
    exact = [t.double() if t.is_floating_point() else t.clone() for t in memory.tensors]
    state = State(program, memory.slab.double(), flags, exact)
    kept: list[tuple[int, int]] = []
    for phase in phases:
        for barrier in phase.barriers:
            if state.holds(barrier.flag):
                barriers_reference.RUN[type(barrier)](state, barrier)
        for step in phase.steps:
            if state.holds(step.flag):
                reference.RUN[type(step)](state, step)
            if isinstance(step, Pool) and step.index != NONE:
                kept.append((step.index, memory.images * step.index_image))
    work, slab, tensors = _run(memory, program, flags)
    found = slab.cpu().clone()
    for at, count in kept:
        # bytes there: fp64 has them elsewhere
        found[at : at + count] = state.slab[at : at + count] = 0
    same(found, state.slab, tolerance)
    if memory.sums:
        same(work[: 2 * memory.sums].cpu().view(torch.float64), state.sums.plain, tolerance)
    if memory.gradients:
        start = -(-2 * memory.sums // 16) * 16
        same(work[start : start + memory.gradients].cpu(), state.gradients, tolerance)
    for number, (tensor, expected) in enumerate(zip(tensors, state.tensors, strict=True)):
        same(tensor.cpu(), expected, tolerance)
        memory.tensors[number] = tensor
    memory.slab = slab.cpu()


def run_steps(memory: Memory, *steps: object) -> None:
    """Run steps in Triton."""
    sums_of(memory, *steps)


def sums_of(memory: Memory, *steps: object) -> Tensor:
    """Run steps in Triton: the sums, in fp64."""
    program = memory.program(Phase((), steps))  # type: ignore[arg-type]
    work, slab, _ = _run(memory, program, torch.tensor([*memory.flags, 0], dtype=torch.uint8))
    memory.slab = slab.cpu()
    return work[: 2 * memory.sums].cpu().view(torch.float64)


def _run(memory: Memory, program: Program, flags: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Work memory, slab and tensors afterwards."""
    prepared = cuda.prepare(program, DEVICE, "ieee")
    work, slab = empty(prepared.work).to(DEVICE), memory.slab.to(DEVICE)
    tensors = [tensor.to(DEVICE) for tensor in memory.tensors]
    prepared.run(slab, work, flags, tensors)
    return work, slab, tensors


def compare_steps(memory: Memory, *steps: object) -> None:
    compare(memory, Phase((), steps))  # type: ignore[arg-type]
