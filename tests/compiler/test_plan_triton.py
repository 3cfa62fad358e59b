"""A whole region on the kernels for GPUs: in Triton's interpreter, or on a GPU where there is one.

tests/kernels/test_other_processes.py runs these tests in the interpreter; elsewhere they are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nascompile.compiler.region import region, selftest
from nascompile.compiler.region.executors import TRITON
from nascompile.kernels.plan import cuda
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.run import prepared
from nascompile.kernels.plan.steps import ConvolveBackward

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def run(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    work.fill_(torch.nan)
    prepared(program, encoded, slab.device).run(slab, work, flags, tensors)


@pytest.fixture(autouse=True)
def plans_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cuda.why_not(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    here = replace(TRITON, device=DEVICE.type, run=run, why_not=cuda.why_not)
    monkeypatch.setattr(region, "EXECUTORS", (here,))


@pytest.mark.parametrize("channels", [5, 16])
def test_a_region_equals_the_network(channels: int) -> None:
    assert selftest.problems(DEVICE, channels, size=6) == []


@pytest.mark.parametrize("is_backward", [False, True])
def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, is_backward: bool) -> None:
    """The self-test, with one result that is one percent off."""

    def off(program: Program, *arguments: Any) -> None:
        run(program, *arguments)
        has_gradients = any(isinstance(step, ConvolveBackward) for p in program.phases for step in p.steps)
        if has_gradients == is_backward:
            arguments[-1][-1].mul_(1.01)

    here = replace(TRITON, device=DEVICE.type, run=off, why_not=cuda.why_not)
    monkeypatch.setattr(region, "EXECUTORS", (here,))
    assert selftest.problems(DEVICE, 5, size=6)
