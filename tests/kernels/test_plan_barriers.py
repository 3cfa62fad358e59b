"""The executor of plans: its barrier operations against torch, its phases and chunks, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from nascompile.kernels import native
from nascompile.kernels.plan import run as plan_run
from nascompile.kernels.plan.program import VERSION, Phase, aligned, encode
from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Coefficients,
    Combine,
    DecisionGradient,
    Load,
    Normalise,
    NormaliseBackward,
    PackDense,
    PackDepthwise,
    Reduce,
    Space,
    Term,
    UnpackDense,
    UnpackDepthwise,
    Upstream,
    Weighted,
)
from tests.kernels.plan_memory import Memory, empty, indexed, instruction_set, same, spread, strides

__all__ = ["instruction_set"]
pytestmark = pytest.mark.usefixtures("instruction_set")

SEGMENTS = ((3, 4, 0), (0, 3, 5))
"""Seven channels in sixteen, in two parts, the second first."""


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


def planted_gradients(memory: Memory, channels: int, pixels: int) -> tuple[Phase, torch.Tensor]:
    """A phase that adds numbers to all chunks' gradients, from their begin, and the sums over the images."""
    source = memory.filled(channels, (1, pixels))
    memory.gradients = pixels * source.channels
    # gradients lie just before scratch
    target = replace(source, space=Space.scratch, offset=-aligned(memory.gradients), image=0)
    step = Combine((Term(source, NONE, NONE),), NONE, Activation.none, target, 1, NONE)
    return Phase((), (step,)), memory.view(source).double().sum(0)[:, 0].t()


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_gradients_of_all_chunks_are_unpacked(chunks):
    memory = Memory(images=3, chunks=chunks)
    phase, packed = planted_gradients(memory, 16, 2 * 16 + 5)
    depthwise, dense = torch.full((7, 1, 1, 5), torch.nan), torch.full((6, 7, 2), torch.nan)
    ins, outs = SEGMENTS, ((0, 5, 2), (5, 1, 9))
    memory.run(
        phase,
        Phase(
            (
                UnpackDense(0, 2, ins, outs, 16, 16, memory.tensor(dense)),
                UnpackDepthwise(2 * 256, 5, SEGMENTS, 16, memory.tensor(depthwise)),
            ),
            (),
        ),
    )
    for logical, padded in indexed(SEGMENTS):
        same(depthwise[logical, 0, 0], packed[32:, padded])
    for i, i_padded in indexed(ins):
        for o, o_padded in indexed(outs):
            same(dense[o, i], packed[:32].view(2, 16, 16)[:, i_padded, o_padded])


class Norm:
    """A BatchNorm over seven channels of a random map, in a plan and in torch."""

    def __init__(
        self, memory: Memory, *, momentum: float | None = 0.3, batch: bool = True, affine: bool = True
    ):
        self.memory = memory
        self.module = nn.BatchNorm2d(7, eps=1e-3, momentum=momentum, affine=affine).train(batch)
        for tensor in self.module.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(4))
        self.exact = copy.deepcopy(self.module).double()
        self.y = memory.filled(16, (3, 5))
        self.channels = self.y.channels
        self.elements = memory.images * 15
        padding = [c for c in range(self.channels) if c not in [padded for _, padded in indexed(SEGMENTS)]]
        memory.view(self.y)[:, padding] = 0
        self.moments = memory.summed(2 * self.channels) if batch else NONE
        self.vectors = memory.take(4 * self.channels)
        state = self.module.state_dict()
        gamma, beta, mean, var, counter = (
            memory.tensor(state[name].detach()) if name in state else NONE
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        )
        self.normalise = Normalise(
            *(self.moments, self.elements, 1e-3, -1.0 if momentum is None else momentum),
            *(gamma, beta, mean, var, counter, SEGMENTS, self.channels, self.vectors),
        )
        measured = Combine((Term(self.y, NONE, NONE),), NONE, Activation.none, self.y, 0, self.moments)
        self.measure = Phase((), (measured,) if batch else ())

    def logical(self, tensor: torch.Tensor) -> torch.Tensor:
        """The seven channels of a padded dimension 1, in their order, in fp64."""
        return tensor[:, [padded for _, padded in sorted(indexed(SEGMENTS))]].double()

    def vector(self, number: int) -> torch.Tensor:
        return self.memory.read(self.vectors + number * self.channels, self.channels)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("batch", [False, True])
def test_normalise(batch, momentum, affine):
    memory = Memory(images=4, chunks=3)
    norm = Norm(memory, batch=batch, momentum=momentum, affine=affine)
    memory.run(norm.measure, Phase((norm.normalise,), ()))
    y = memory.view(norm.y)
    found = norm.logical(y * spread(norm.vector(2)) + spread(norm.vector(3)))
    same(found, norm.exact(norm.logical(y)), 1e-5)
    for name, tensor in norm.exact.state_dict().items():
        same(norm.module.state_dict()[name], tensor, 1e-6)
    if batch:
        same(norm.logical(norm.vector(0)[None])[0], norm.logical(y).mean((0, 2, 3)))
    padding = torch.ones(norm.channels, dtype=torch.bool)
    padding[[padded for _, padded in indexed(SEGMENTS)]] = False
    assert not norm.vector(2)[padding].any()
    assert not norm.vector(3)[padding].any()


@pytest.mark.parametrize("batch", [False, True])
def test_normalise_and_its_gradients(batch):
    memory = Memory(images=4, chunks=2)
    norm = Norm(memory, batch=batch)
    channels = norm.channels
    on, off = memory.flag(1), memory.flag(0)
    decision = torch.rand(3)
    number = memory.tensor(decision)
    gradients = [memory.filled(16, (3, 5)) for _ in range(3)]
    sums = [(memory.summed(channels), memory.summed(channels)) for _ in gradients]
    reduce = tuple(
        Reduce(gradient, (Term(norm.y, sum_gy, NONE),), sum_g)
        for gradient, (sum_g, sum_gy) in zip(gradients, sums, strict=True)
    )
    outs = [memory.take(channels) for _ in gradients]
    upstream = tuple(
        Upstream(weight, *sums[k], outs[k], flag)
        for k, (weight, flag) in enumerate(((2, on), (NONE, NONE), (1, off)))
    )
    by_y, constant = memory.vector(torch.randn(channels)), memory.vector(torch.randn(channels))
    gamma, beta = torch.zeros(7), torch.zeros(7)
    elements = norm.elements if batch else 0
    rest = (SEGMENTS, channels)
    backward = NormaliseBackward(
        *(norm.vectors, elements, upstream, number, by_y, constant, 1),
        *(memory.tensor(gamma), memory.tensor(beta), *rest),
    )
    # the second time everything is added
    again = replace(backward, starts=0, gamma=NONE, beta=NONE)
    summed = torch.full((3,), 10.0)
    choice = tuple(
        DecisionGradient(weight, *sums[k], *vectors, channels, memory.tensor(summed))
        for k, weight, vectors in (
            (0, 2, (norm.vectors + 2 * channels, norm.vectors + 3 * channels)),
            (1, 0, (NONE, NONE)),
        )
    )
    memory.run(
        norm.measure, Phase((norm.normalise,), ()), Phase((), reduce), Phase((backward, again, *choice), ())
    )
    y = memory.view(norm.y)
    wide = norm.logical(y).requires_grad_()
    g = [norm.logical(memory.view(gradient)) for gradient in gradients]
    total = decision[2].double() * g[0] + g[1]
    output = norm.exact(wide)
    expected = torch.autograd.grad(output, (wide, norm.exact.weight, norm.exact.bias), total)
    vectors = [norm.logical(memory.read(at, channels)[None])[0] for at in (outs[0], outs[1], by_y, constant)]
    found = spread(vectors[0]) * g[0] + spread(vectors[1]) * g[1]
    found = found + (spread(vectors[2]) * wide.detach() + spread(vectors[3])) / 2
    same(found, expected[0], 1e-5)
    same(gamma, expected[1], 1e-5)
    same(beta, expected[2], 1e-5)
    assert memory.read(outs[2], channels).isnan().all()
    same(summed[2] - 10, (g[0] * output.detach()).sum(), 1e-5)
    same(summed[0] - 10, (memory.view(gradients[1]).double() * y).sum(), 1e-5)
    assert summed[1] == 10


@pytest.mark.parametrize("wanted", [False, True])
def test_coefficients(wanted):
    memory = Memory()
    channels = 16
    decision = torch.rand(4)
    off, on = memory.flag(0), memory.flag(1)
    scales, shifts = [memory.random(channels) for _ in range(3)], [memory.random(channels) for _ in range(3)]
    outs = [memory.take(channels) for _ in range(4)]
    constant = memory.take(channels) if wanted else NONE
    terms = (
        Weighted(3, scales[0], shifts[0], outs[0], NONE),
        Weighted(NONE, scales[1], shifts[1], outs[1], on),
        Weighted(0, NONE, NONE, outs[2], NONE),
        Weighted(1, scales[2], shifts[2], outs[3], off),
    )
    memory.run(Phase((Coefficients(terms, memory.tensor(decision), constant, channels),), ()))
    same(memory.read(outs[0], channels), decision[3] * memory.read(scales[0], channels))
    assert torch.equal(memory.read(outs[1], channels), memory.read(scales[1], channels))
    assert torch.equal(memory.read(outs[2], channels), decision[0].expand(channels))
    assert memory.read(outs[3], channels).isnan().all()
    if wanted:
        expected = decision[3] * memory.read(shifts[0], channels) + memory.read(shifts[1], channels)
        same(memory.read(constant, channels), expected)


def test_a_barrier_comes_before_the_steps_of_its_phase_and_after_those_before():
    memory = Memory(images=5, chunks=2)
    norm = Norm(memory)
    out = memory.map(16, (3, 5))
    step = Combine(
        (Term(norm.y, norm.vectors + 2 * norm.channels, NONE),),
        *(norm.vectors + 3 * norm.channels, Activation.relu, out, 0, NONE),
    )
    off = memory.flag(0)
    memory.run(
        norm.measure,
        Phase((norm.normalise,), (step,)),
        Phase((replace(norm.normalise, flag=off),), (replace(step, adds=1, flag=off),)),
    )
    same(norm.logical(memory.view(out)), norm.exact(norm.logical(memory.view(norm.y))).relu(), 1e-5)


def test_an_empty_batch_and_an_empty_program_run():
    for images, phases in ((0, 1), (2, 0)):
        memory = Memory(images=images, chunks=2)
        map = memory.map(16, (1, 1))
        memory.run(*[Phase((), (Combine((), NONE, Activation.none, map, 0, NONE),))] * phases)


def test_what_does_not_fit_is_refused():
    memory = Memory(images=2, chunks=2)
    tensor = torch.zeros(2, 16, 3, 3)
    map = memory.map(16, (3, 3))
    load = Load(memory.tensor(tensor), *strides(tensor), ((0, 16, 0),), map, 0)
    weights = memory.tensor(torch.zeros(16, 16, 3, 3).contiguous(memory_format=torch.channels_last))
    program = memory.program(Phase((), (load,)))
    encoded = encode(program)
    flags = torch.zeros(1, dtype=torch.uint8)
    work = empty(program.work + 32)

    def refuse(message: str, **other: Any) -> None:
        arguments: dict[str, Any] = {"encoded": encoded, "slab": memory.slab, "work": work, "flags": flags}
        arguments |= {"tensors": memory.tensors, **other}
        with pytest.raises(RuntimeError, match=message):
            plan_run.run(program, **arguments)

    def of(*barriers: Any, steps: tuple[Any, ...] = ()) -> torch.Tensor:
        return encode(memory.program(Phase(barriers, steps)))

    pack = PackDense(weights, 9, ((0, 16, 0),), ((0, 16, 0),), 16, 16, 0, NONE)
    other = encoded.clone()
    other[0] = 7
    refuse(f"program has version 7, this build runs version {VERSION}", encoded=other)
    refuse("program must be a contiguous int64 tensor", encoded=encoded.int())
    refuse("program is too short", encoded=encoded[:3])
    refuse("pads channels to a multiple of 4", encoded=encode(replace(program, lane=4)))
    refuse("at least 1 is needed", encoded=encode(replace(program, chunks=0)))
    refuse("slab must be a contiguous fp32 tensor", slab=memory.slab.double())
    refuse("slab must be a contiguous fp32 tensor", slab=memory.slab[::2])
    refuse("slab must begin at a multiple of 64 bytes", slab=memory.slab[1:])
    refuse("work must begin at a multiple of 64 bytes", work=work[1:])
    refuse("the program needs 8448", encoded=encode(replace(program, sums=3)), work=work[:1])
    refuse("flags must be a contiguous uint8 tensor", flags=flags.bool())
    refuse("uses flag 1, there are 1", encoded=of(steps=(replace(load, flag=1),)))
    refuse("uses tensor 0, there are 0", tensors=[])
    refuse("tensor 0 must be fp32", tensors=[tensor.double(), tensor])
    refuse(
        "tensor 0 has size 3 and stride 1 in dimension 3, the program expects 2",
        encoded=of(steps=(replace(load, target=replace(map, width=2)),)),
    )
    refuse(
        "tensor 0 has size 16 and stride 1 in dimension 1",
        tensors=[tensor.contiguous(memory_format=torch.channels_last), tensor],
    )
    refuse("tensor 1 is not contiguous", encoded=of(pack))
    refuse(
        "tensor 0 must be int64",
        encoded=of(Normalise(NONE, 1, 0.1, 0.1, NONE, NONE, NONE, NONE, 0, (), 16, 0)),
    )
    assert memory.slab.isnan().all()


def test_without_the_extension_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "not built"))
    assert plan_run.why_not_native(torch.device("cpu")) == "not built"
    with pytest.raises(RuntimeError, match="a plan cannot be run: not built"):
        plan_run.lane()
    if not torch.cuda.is_available():
        assert plan_run.why_not_native(torch.device("cuda")) == "torch sees no GPU"
