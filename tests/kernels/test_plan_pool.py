"""Pooling in plans, forward and backward, against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from nascompile.kernels.plan.steps import NONE, Map, Pool, PoolBackward, Term
from tests.kernels.plan_memory import SIZES, Memory, instruction_set, same, spread

__all__ = ["instruction_set"]
pytestmark = pytest.mark.usefixtures("instruction_set")

WINDOWS = ((3, 1, 1), (3, 2, 1), (2, 2, 0), ((5, 3), (2, 1), (2, 0)))
"""kernel, stride, padding; the first is taken apart into rows and columns."""


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


class Case:
    """A pooling step over a random map, and the same in torch."""

    def __init__(
        self, size, window, *, is_max: int, counts_padding: int = 0, channels: int = 24, pixel: int = 0
    ):
        kernel, stride, padding = (pair(value) for value in window)
        if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
            pytest.skip("the window is larger than the image")
        self.memory = Memory(images=3, chunks=2)
        self.options = (is_max, *kernel, *stride, *padding, counts_padding)
        self.function: Callable[[Tensor], Tensor]
        if is_max:
            self.function = lambda x: max_pool2d(x, kernel, stride, padding)
        else:
            self.function = lambda x: avg_pool2d(x, kernel, stride, padding, False, bool(counts_padding))
        self.x = self.memory.filled(channels, size, pixel=pixel)
        out = self.function(self.memory.view(self.x))
        self.y = self.memory.map(channels, (out.shape[2], out.shape[3]), pixel=pixel)
        self.bytes = self.y.height * self.y.width * self.y.channels
        self.index_image = -(-self.bytes // 64) * 16
        self.index = self.memory.take(3 * self.index_image)

    def pool(self, *, index: bool, moments: int = NONE) -> Pool:
        where = (self.index, self.index_image) if index else (NONE, 0)
        return Pool(self.x, self.y, *self.options, *where, moments)

    def check_forward(self) -> None:
        expected = self.function(self.memory.view(self.x).double())
        same(self.memory.view(self.y), expected)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_max_pooling(size, window, index):
    case = Case(size, window, is_max=1, pixel=64 if index else 0)
    channels = case.y.channels
    moments = case.memory.summed(2 * channels)
    case.memory.run_steps(case.pool(index=index, moments=moments))
    case.check_forward()
    value = case.memory.view(case.y).double()
    sums = case.memory.read_sums(moments, 2 * channels)
    same(sums[:channels], value.sum((0, 2, 3)), 1e-5)
    same(sums[channels:], value.square().sum((0, 2, 3)), 1e-5)


@pytest.mark.parametrize("counts_padding", [0, 1])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_average_pooling(size, window, counts_padding):
    case = Case(size, window, is_max=0, counts_padding=counts_padding, pixel=64)
    case.memory.run_steps(case.pool(index=False))
    case.check_forward()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("content", ["ties", "nan", "minus infinity"])
def test_the_winner_is_torchs(window, content):
    case = Case((7, 6), window, is_max=1)
    x = case.memory.view(case.x)
    if content == "ties":
        x.copy_(torch.randint(0, 3, x.shape))
    elif content == "nan":
        x[torch.rand(x.shape) < 0.2] = torch.nan
    else:
        x.fill_(-torch.inf)
    case.memory.run_steps(case.pool(index=True))
    kernel, stride, padding = (pair(value) for value in window)
    values, winners = max_pool2d(x, kernel, stride, padding, return_indices=True)
    same(case.memory.view(case.y), values)
    start = case.index
    memory = case.memory.slab[start : start + 3 * case.index_image].view(torch.uint8)
    shape = (3, case.y.height, case.y.width, case.y.channels)
    numbers = memory.view(3, -1)[:, : case.bytes].reshape(shape).permute(0, 3, 1, 2).long()
    rows = torch.arange(case.y.height)[:, None] * stride[0] - padding[0] + numbers // kernel[1]
    columns = torch.arange(case.y.width) * stride[1] - padding[1] + numbers % kernel[1]
    assert torch.equal(rows * case.x.width + columns, winners)


@pytest.mark.parametrize("is_max", [0, 1])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward(size, window, is_max):
    case = Case(size, window, is_max=is_max, counts_padding=size[0] == 5, pixel=48)
    memory, y = case.memory, case.y
    shape = (y.height, y.width)
    first, second, third = (memory.filled(24, shape, pixel=pixel) for pixel in (0, 64, 0))
    off = memory.flag(0)
    vector, constant = memory.random(y.channels), memory.random(y.channels)
    terms = (Term(first, vector, NONE), Term(third, vector, off), Term(second, NONE, NONE))
    dx: Map = memory.filled(24, size)
    before = memory.view(dx).clone()
    tile = memory.map(24, shape, scratch=True)
    backward = PoolBackward(
        *(terms, constant, tile, dx, *case.options, case.index if is_max else NONE, case.index_image)
    )
    memory.run_steps(case.pool(index=bool(is_max)), backward)
    x = memory.view(case.x).double().requires_grad_()
    dy = spread(memory.read(vector, y.channels)) * memory.view(first) + memory.view(second)
    dy = dy + spread(memory.read(constant, y.channels))
    expected = torch.autograd.grad(case.function(x), x, dy.double())[0]
    same(memory.view(dx), before + expected)
