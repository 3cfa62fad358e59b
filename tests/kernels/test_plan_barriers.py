"""The executor of plans: its barrier operations against torch, its phases and chunks, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nascompile.kernels import native
from nascompile.kernels.plan import run as plan_run
from nascompile.kernels.plan.program import Phase, Program, encode
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
from tests.kernels.plan_memory import Memory, empty, indexed, instruction_set, same, spread

__all__ = ["instruction_set"]
pytestmark = pytest.mark.usefixtures("instruction_set")

ROOT = Path(__file__).resolve().parents[2]
SEGMENTS = ((3, 4, 0), (0, 3, 5))
"""Seven channels in sixteen, in two parts, the second first."""


def test_the_operator_has_one_schema():
    text = re.sub(r'"\s*\n\s*"', "", (ROOT / "csrc" / "ops.cpp").read_text())
    assert f'"{plan_run.SCHEMA}"' in text


def test_depthwise_weights_are_packed_and_unpacked():
    memory = Memory(chunks=2)
    weights, gradient = torch.randn(7, 1, 3, 2), torch.full((7, 1, 3, 2), torch.nan)
    target = memory.take(6 * 16)
    memory.gradients = 200
    pack = PackDepthwise(memory.tensor(weights), 6, SEGMENTS, 16, target)
    memory.run(Phase((pack,), ()))
    packed = memory.read(target, 6 * 16).view(6, 16)
    expected = torch.zeros(6, 16)
    for logical, padded in indexed(SEGMENTS):
        expected[:, padded] = weights[logical].flatten()
    assert torch.equal(packed, expected)
    # gradients are zero where no step adds to them
    memory.run(Phase((UnpackDepthwise(5, 6, SEGMENTS, 16, memory.tensor(gradient)),), ()))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("part", ["both", "target", "transposed"])
def test_dense_weights_are_packed_both_ways(part):
    memory = Memory()
    ins, outs = SEGMENTS, ((0, 5, 2), (5, 1, 9))
    weights = torch.randn(6, 7, 1, 3)
    target, transposed = memory.take(3 * 16 * 16), memory.take(3 * 16 * 16)
    expected = torch.zeros(3, 16, 16)
    for i, i_padded in indexed(ins):
        for o, o_padded in indexed(outs):
            expected[:, i_padded, o_padded] = weights[o, i].flatten()
    memory.run(
        Phase(
            (
                PackDense(
                    *(memory.tensor(weights), 3, ins, outs, 16, 16),
                    NONE if part == "transposed" else target,
                    NONE if part == "target" else transposed,
                ),
            ),
            (),
        )
    )
    if part != "transposed":
        assert torch.equal(memory.read(target, 3 * 256).view(3, 16, 16), expected)
    if part != "target":
        assert torch.equal(memory.read(transposed, 3 * 256).view(3, 16, 16), expected.transpose(1, 2))
