"""A whole region on the kernels for GPUs: in Triton's interpreter, or on a GPU where there is one.

tests/kernels/test_other_processes.py runs these tests in the interpreter; elsewhere they are skipped.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nascompile
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.region import region, scratch, selftest
from nascompile.compiler.region.executors import TRITON
from nascompile.kernels.plan import cuda
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.run import prepared
from nascompile.kernels.plan.steps import ConvolveBackward

# the interpreter computes in NumPy, which says what it meets; a warning in a plan sends the model op by op
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def run(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    work.fill_(torch.nan)
    prepared(program, encoded, slab.device).run(slab, work, flags, tensors)


HERE = replace(
    TRITON,
    device=DEVICE.type,
    work=lambda program, encoded, device: prepared(program, encoded, device).work,
    run=run,
    why_not=cuda.why_not,
)


@pytest.fixture(autouse=True)
def plans_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cuda.why_not(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(region, "EXECUTORS", (HERE,))


@pytest.mark.parametrize("copies", [scratch.COPIES, 1 << 13], ids=["own images", "few images"])
def test_a_region_equals_the_network(monkeypatch: pytest.MonkeyPatch, copies: int) -> None:
    monkeypatch.setattr(scratch, "COPIES", copies)
    assert selftest.problems(DEVICE, 5, size=6) == []


def test_wider_blocks() -> None:
    assert selftest.problems(DEVICE, 16, 4, selftest.DECISIONS[:2]) == []


def test_the_gradients_of_an_input_alone() -> None:
    torch.manual_seed(0)
    exact = selftest.Specimen(5).double()
    network = copy.deepcopy(exact).float().to(DEVICE)
    mutators, model = (Mutator(network), Mutator(exact)), nascompile.compile(network)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = []
    for one, mutator, image in ((model, mutators[0], x.float().to(DEVICE)), (exact, mutators[1], x)):
        masks = {key: torch.tensor(mask) for key, mask in selftest.DECISIONS[0].items()}
        mutator.decide({key: mask.to(image) for key, mask in masks.items()})
        image.requires_grad_()
        # the parameters want gradients, but not now
        found += torch.autograd.grad(one(image).square().sum(), image)
    torch.testing.assert_close(found[0].cpu().double(), found[1], rtol=1e-4, atol=1e-4)
    assert model.plans, model.notes


@pytest.mark.parametrize("is_backward", [False, True])
def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, is_backward: bool) -> None:
    """The self-test, with one result that is one percent off."""

    def off(program: Program, *arguments: Any) -> None:
        run(program, *arguments)
        has_gradients = any(isinstance(step, ConvolveBackward) for p in program.phases for step in p.steps)
        if has_gradients == is_backward:
            arguments[-1][-1].mul_(1.01)

    monkeypatch.setattr(region, "EXECUTORS", (replace(HERE, run=off),))
    assert selftest.problems(DEVICE, 5, 6, selftest.DECISIONS[:1])
