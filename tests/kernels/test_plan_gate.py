"""Products of images, with another or with one number a channel, against plain torch in fp64."""

from __future__ import annotations

import pytest
import torch

from nascompile.kernels.plan.steps import NONE, Gate, GateGradient
from tests.kernels.plan_memory import SIZES, Memory, instruction_set, same
from tests.kernels.test_plan_maps import mixed_map

__all__ = ["instruction_set"]
pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("adds", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_gate(size, adds, single):
    memory = Memory(images=3, chunks=2)
    image, target = mixed_map(memory, 40, size, adds), mixed_map(memory, 40, size, 2 + adds)
    gate = mixed_map(memory, 40, (1, 1) if single else size, 1)
    channels = target.channels
    moments = memory.summed(2 * channels)
    expected = memory.view(image).double() * memory.view(gate).double()
    if adds:
        expected += memory.view(target)
    memory.run_steps(Gate(image, gate, target, adds, moments))
    same(memory.view(target), expected)
    sums = memory.read_sums(moments, 2 * channels)
    same(sums[:channels], expected.sum((0, 2, 3)), 1e-5)
    same(sums[channels:], expected.square().sum((0, 2, 3)), 1e-5)


@pytest.mark.parametrize("size", [*SIZES, (40, 33)])
@pytest.mark.parametrize("layout", [0, 2, 3])
def test_gate_gradient(size, layout):
    memory = Memory(images=2, chunks=2)
    gradient, image = mixed_map(memory, 24, size, layout), mixed_map(memory, 24, size, 0)
    target = memory.filled(24, (1, 1), pixel=48)
    before = memory.view(target).double()
    memory.run_steps(GateGradient(gradient, image, target))
    products = memory.view(gradient).double() * memory.view(image).double()
    same(memory.view(target), before + products.sum((2, 3), keepdim=True), 1e-5)


def test_a_gate_of_nan_is_nan():
    memory = Memory(images=1)
    image, gate, target = memory.filled(16, (2, 3)), memory.filled(16, (1, 1)), memory.map(16, (2, 3))
    memory.view(gate)[0, 5] = torch.nan
    memory.run_steps(Gate(image, gate, target, 0, NONE))
    assert memory.view(target).isnan().sum() == 6
