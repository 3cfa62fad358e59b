"""The steps of a plan that go over whole maps, each against plain torch in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nascompile.kernels.plan.program import Phase
from nascompile.kernels.plan.steps import (
    MASKS,
    NONE,
    Activation,
    Combine,
    Load,
    Map,
    Mask,
    Pick,
    Reduce,
    Stage,
    Store,
    Term,
    Unstage,
)
from tests.kernels.plan_memory import SIZES, Memory, indexed, instruction_set, same, spread, strides

__all__ = ["instruction_set"]
pytestmark = pytest.mark.usefixtures("instruction_set")

ACTIVATIONS = {
    Activation.none: lambda x: x,
    Activation.relu: torch.relu,
    Activation.relu6: nn.functional.relu6,
    Activation.hardswish: nn.functional.hardswish,
    Activation.hardsigmoid: nn.functional.hardsigmoid,
    Activation.silu: nn.functional.silu,
    Activation.sigmoid: torch.sigmoid,
    Activation.gelu: nn.functional.gelu,
    Activation.leaky_relu: nn.functional.leaky_relu,
    Activation.elu: nn.functional.elu,
    Activation.negative: lambda x: torch.where(x > 0, 0, x),
    Activation.positive: lambda x: torch.where(x > 0, x, 0),
}
BATCHES = ((1, 1), (5, 2), (1, 3))
"""Images and chunks: more and fewer images than chunks."""


def derivative(activation: Activation, value: Tensor) -> Tensor:
    """The activation's slope."""
    value = value.double().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](value).sum(), value)[0]


def mixed_map(memory: Memory, channels: int, size: tuple[int, int], number: int) -> Map:
    """A random map: dense, or a slice of wider pixels, or with a margin, by its number."""
    layouts = ({}, {"pixel": 64}, {"margin": 2}, {"pixel": 48, "margin": 1})
    return memory.filled(channels, size, **layouts[number % len(layouts)])


@pytest.mark.parametrize("layout", ["channels first", "channels last", "cropped"])
@pytest.mark.parametrize("adds", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_load_and_store(size, adds, layout):
    memory = Memory(images=3, chunks=2)
    # 25 channels of 30 go to 48, in two parts
    segments = ((4, 17, 0), (0, 3, 19), (22, 5, 27))
    height, width = size
    tensor = torch.randn(3, 30, height, width)
    if layout == "channels last":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if layout == "cropped":
        tensor = torch.randn(3, 30, height + 1, 2 * width)[:, :, 1:, ::2]
    out = torch.full_like(tensor, -1)
    target = mixed_map(memory, 48, size, 3 if adds else 0)
    before = memory.view(target).clone()
    memory.run_steps(
        Load(memory.tensor(tensor), *strides(tensor), segments, target, adds),
        Store(memory.tensor(out), *strides(out), segments, target),
    )
    expected = before if adds else torch.zeros_like(before)
    stored = torch.full_like(out, -1)
    for logical, padded in indexed(segments):
        expected[:, padded] += tensor[:, logical]
        stored[:, logical] = expected[:, padded]
    assert torch.equal(memory.view(target), expected)
    assert torch.equal(out, stored)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("size", SIZES)
def test_stage_keeps_the_zeros_around(size, activation):
    memory = Memory(images=3, chunks=2)
    source = memory.filled(24, size, pixel=48)
    scale, shift = memory.random(source.channels), memory.random(source.channels)
    memory.slab[source.offset] = torch.nan
    padded = memory.map(24, size, margin=2, scratch=True)
    height, width = size
    around = Map(padded.space, 0, 0, padded.row, padded.pixel, padded.channels, height + 4, width + 4)
    out = memory.map(24, (height + 4, width + 4))
    copy = Combine((Term(around, NONE, NONE),), NONE, Activation.none, out, 0, NONE)
    memory.run_steps(Stage(source, scale, shift, activation, padded), copy)
    vectors = [spread(memory.read(at, source.channels)).double() for at in (scale, shift)]
    value = ACTIVATIONS[activation](vectors[0] * memory.view(source).double() + vectors[1])
    same(memory.view(out), nn.functional.pad(value, (2, 2, 2, 2)))
    assert memory.view(out)[0, 0, 2, 2].isnan() == (activation != Activation.positive)


def test_stage_without_vectors_copies():
    memory = Memory()
    source = memory.filled(16, (5, 7))
    target = memory.map(16, (5, 7))
    memory.run_steps(Stage(source, NONE, NONE, Activation.none, target))
    assert torch.equal(memory.view(target), memory.view(source))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9, 150])
@pytest.mark.parametrize("activation", [Activation.none, Activation.relu6, Activation.silu])
@pytest.mark.parametrize("adds", [0, 1])
@pytest.mark.parametrize(("channels", "size"), [(16, (1, 1)), (40, (5, 7)), (16, (20, 17))])
def test_combine(count, activation, adds, channels, size):
    memory = Memory(images=2, chunks=2)
    off, on = memory.flag(0), memory.flag(2)
    size = (2, 3) if count == 150 else size
    maps = [mixed_map(memory, channels, size, k % 7) for k in range(count)]
    target = mixed_map(memory, channels, size, count)
    constant = memory.random(target.channels) if count != 3 else NONE
    terms = tuple(
        Term(
            map,
            NONE if k == 2 else memory.random(map.channels),
            on if k == 1 else off if k % 5 == 3 else NONE,
        )
        for k, map in enumerate(maps)
    )
    moments = memory.summed(2 * target.channels)
    expected = torch.zeros(memory.view(target).shape, dtype=torch.float64)
    if constant != NONE:
        expected += spread(memory.read(constant, target.channels))
    for term in terms:
        if term.flag != off:
            vector = (
                1.0 if term.coefficient == NONE else spread(memory.read(term.coefficient, target.channels))
            )
            expected += vector * memory.view(term.map).double()
    expected = ACTIVATIONS[activation](expected) + (memory.view(target) if adds else 0)
    memory.run_steps(Combine(terms, constant, activation, target, adds, moments))
    same(memory.view(target), expected, 1e-5)
    sums = memory.read_sums(moments, 2 * target.channels)
    same(sums[: target.channels], expected.sum((0, 2, 3)), 1e-5)
    same(sums[target.channels :], expected.square().sum((0, 2, 3)), 1e-5)


def test_combine_of_one_kind_of_map_in_place_of_the_sum():
    memory = Memory(images=4, chunks=1)
    maps = [memory.filled(32, (9, 9)) for _ in range(11)]
    target = memory.map(32, (9, 9), pixel=64)
    memory.view(target).fill_(7)
    terms = tuple(Term(map, NONE, NONE) for map in maps)
    memory.run_steps(Combine(terms, NONE, Activation.none, target, 0, NONE))
    same(memory.view(target), torch.stack([memory.view(map).double() for map in maps]).sum(0))


@pytest.mark.parametrize(("images", "chunks"), BATCHES)
@pytest.mark.parametrize("count", [0, 1, 6, 11])
@pytest.mark.parametrize(("channels", "size"), [(16, (1, 1)), (40, (5, 7)), (16, (20, 17))])
def test_reduce(count, channels, size, images, chunks):
    memory = Memory(images, chunks)
    off = memory.flag(0)
    gradient = mixed_map(memory, channels, size, count)
    maps = [mixed_map(memory, channels, size, k if count == 6 else 0) for k in range(count)]
    terms = tuple(
        Term(map, memory.summed(map.channels), off if k == 4 else NONE) for k, map in enumerate(maps)
    )
    total = NONE if count == 6 else memory.summed(gradient.channels)
    memory.run_steps(Reduce(gradient, terms, total))
    wide = memory.view(gradient).double()
    for term in terms:
        expected = (wide * memory.view(term.map)).sum((0, 2, 3)) * (term.flag == NONE)
        same(memory.read_sums(term.coefficient, gradient.channels), expected, 1e-5)
    if total != NONE:
        same(memory.read_sums(total, gradient.channels), wide.sum((0, 2, 3)), 1e-5)


@pytest.mark.parametrize("ratio", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize(("channels", "size"), [(16, (20, 17)), (40, (9, 7)), (1040, (3, 3))])
def test_sums_keep_the_digits_that_a_batch_norm_needs(ratio, channels, size):
    """It subtracts the mean of a map, so many deviations from zero, from what is summed."""
    memory = Memory(images=2, chunks=1)
    gradient, target = memory.filled(channels, size), memory.map(channels, size)
    maps = [memory.filled(channels, size) for _ in range(2)]
    memory.view(gradient).add_(1)
    for map in maps:
        memory.view(map).add_(ratio)
    total, moments = memory.summed(gradient.channels), memory.summed(2 * gradient.channels)
    terms = tuple(Term(map, memory.summed(map.channels), NONE) for map in maps)
    memory.run_steps(
        Reduce(gradient, terms, total),
        Unstage(gradient, maps[0], NONE, NONE, Activation.none, target, 0, moments),
    )
    wide = memory.view(gradient).double()
    sums = [(total, term.coefficient, term.map) for term in terms]
    for of_gradient, of_product, map in (*sums, (moments, moments + gradient.channels, maps[0])):
        centred = wide * (memory.view(map).double() - ratio)
        found = memory.read_sums(of_product, channels) - ratio * memory.read_sums(of_gradient, channels)
        error = (found - centred[:, :channels].sum((0, 2, 3))).abs()
        assert bool((error <= 1e-6 * centred[:, :channels].abs().sum((0, 2, 3))).all()), error.max()


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("adds", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_unstage(size, adds, activation):
    memory = Memory(images=3, chunks=2)
    gradient, source = mixed_map(memory, 24, size, 2), mixed_map(memory, 24, size, 3)
    target = mixed_map(memory, 24, size, adds)
    channels = source.channels
    scale = memory.vector(torch.randint(1, 4, (channels,)).float())
    shift = memory.vector(torch.randint(-2, 3, (channels,)).float())
    # whole numbers: many values are exactly 0 and 6
    memory.view(source).copy_(torch.randint(-4, 5, memory.view(source).shape))
    moments = memory.summed(2 * channels)
    before = memory.view(target).clone()
    memory.run_steps(Unstage(gradient, source, scale, shift, activation, target, adds, moments))
    value = spread(memory.read(scale, channels)) * memory.view(source) + spread(memory.read(shift, channels))
    passed = memory.view(gradient).double() * derivative(activation, value)
    same(memory.view(target), passed + (before if adds else 0))
    sums = memory.read_sums(moments, 2 * channels)
    same(sums[:channels], passed.sum((0, 2, 3)), 1e-5)
    same(sums[channels:], (passed * memory.view(source)).sum((0, 2, 3)), 1e-5)


@pytest.mark.parametrize("activation", sorted(MASKS))
@pytest.mark.parametrize("size", SIZES)
def test_mask(size, activation):
    memory = Memory(images=3, chunks=2)
    gradient, value = mixed_map(memory, 24, size, 1), mixed_map(memory, 24, size, 2)
    memory.view(value).copy_(ACTIVATIONS[activation](memory.view(value) * 6))
    before = memory.view(gradient).clone()
    memory.run_steps(Mask(gradient, value, activation))
    same(memory.view(gradient), before * derivative(activation, memory.view(value)))


@pytest.mark.parametrize("activation", sorted(set(Activation) - MASKS - {Activation.none}))
def test_activations_at_the_ends(activation):
    """Far out, at the corners, at infinity and at nan: as torch in fp32, and its slope too."""
    memory = Memory(images=1, chunks=1)
    source, target, back = (memory.map(16, (4, 4)) for _ in range(3))
    gradient = memory.filled(16, (4, 4))
    values = torch.tensor([9, 9, 0.0, 3, -3, -6, 1e-6, -1e-6, 20, -20, 87.5, -87.5, 200, -200, 1e30, -1e30])
    memory.view(source).copy_(values[:, None, None].expand(16, 4, 4))
    memory.view(source)[0, 0] = torch.nan
    memory.view(source)[0, 1] = torch.inf
    memory.run_steps(
        Stage(source, NONE, NONE, activation, target),
        Unstage(gradient, source, NONE, NONE, activation, back, 0, NONE),
    )
    x = memory.view(source)
    expected, slope = ACTIVATIONS[activation](x.double()), derivative(activation, x)
    found, handed = memory.view(target).double(), memory.view(back).double()
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=3e-7, equal_nan=True)
    inside = torch.isfinite(x) & (x.abs() < 1e4)
    wanted = memory.view(gradient).double() * slope
    torch.testing.assert_close(handed[inside], wanted[inside], rtol=2e-6, atol=1e-6)
    clips = activation in (
        *(Activation.hardsigmoid, Activation.leaky_relu),
        *(Activation.negative, Activation.positive),
    )
    assert handed[0, 0].isnan().all() == (not clips)


def test_pick_repeats_and_sums_channels():
    memory = Memory(images=2)
    one, many, sums = (memory.filled(channels, (3, 5), pixel=48) for channels in (16, 40, 16))
    before, read = memory.view(sums).double(), memory.view(one)[:, 2:3].clone()
    memory.run_steps(Pick(one, many, 2, 0, 5, 1, 21, 0), Pick(many, sums, 6, 2, 3, 0, 9, 1))
    expected = torch.zeros_like(memory.view(many))
    expected[:, 5:26] = read
    assert torch.equal(memory.view(many), expected)
    before[:, 3] += 9 * read[:, 0]
    same(memory.view(sums), before)


@pytest.mark.parametrize("activation", [Activation.hardswish, Activation.gelu])
def test_unstage_in_place(activation):
    memory = Memory(images=2)
    gradient, source = memory.filled(24, (5, 7), pixel=48), memory.filled(24, (5, 7))
    channels = source.channels
    scale, shift = memory.random(channels), memory.random(channels)
    before = memory.view(gradient).double()
    memory.run_steps(Unstage(gradient, source, scale, shift, activation, gradient, 0, NONE))
    value = spread(memory.read(scale, channels)) * memory.view(source) + spread(memory.read(shift, channels))
    same(memory.view(gradient), before * derivative(activation, value))


def test_relu_passes_gradients_on_at_nan_as_torch_does():
    memory = Memory(images=1, chunks=1)
    gradient, value = memory.filled(16, (2, 2)), memory.map(16, (2, 2))
    before = memory.view(gradient).clone()
    memory.run_steps(Mask(gradient, value, Activation.relu))
    assert torch.equal(memory.view(gradient), before)
    assert derivative(Activation.relu, torch.full((64,), torch.nan)).eq(1).all()


@pytest.mark.parametrize(("images", "chunks"), BATCHES)
def test_steps_whose_flags_do_not_hold_are_left_out(images, chunks):
    memory = Memory(images, chunks)
    off, on = memory.flag(0), memory.flag(1)
    source, target = memory.filled(16, (3, 3)), memory.filled(16, (3, 3))
    one, two = (
        Combine((Term(source, NONE, NONE),), NONE, Activation.none, target, 1, NONE, flag)
        for flag in (off, on)
    )
    before = memory.view(target).clone()
    memory.run(Phase((), (one,)), Phase((), (two, one)), Phase((), (one, two)))
    same(memory.view(target), before + 2 * memory.view(source))
