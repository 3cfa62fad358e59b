"""The definition of every step in plain torch: carries out a program for the whole batch, in any dtype.

Slow and simple. It serves the tests (in fp64) and machines without the extension. Maps are strided views of
the slab; scratch has a copy for every image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nascompile.kernels.plan import barriers_reference
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.state import State
from nascompile.kernels.plan.steps import (
    MASKS,
    NONE,
    Activation,
    Combine,
    Convolve,
    ConvolveBackward,
    Gate,
    GateGradient,
    Load,
    Map,
    Mask,
    Pick,
    Pool,
    PoolBackward,
    Reduce,
    Space,
    Stage,
    Store,
    Tap,
    Term,
    Unstage,
)


def run(program: Program, slab: Tensor, flags: Tensor, tensors: Sequence[Tensor]) -> None:
    """Carry out the program. `slab` is a vector of any floating type, `flags` of uint8."""
    state = State(program, slab, flags, tensors)
    for phase in program.phases:
        for barrier in phase.barriers:
            if state.holds(barrier.flag):
                barriers_reference.RUN[type(barrier)](state, barrier)
        for step in phase.steps:
            if state.holds(step.flag):
                RUN[type(step)](state, step)


def load(state: State, step: Load) -> None:
    source = _tensor_view(state, step, step.target)
    target = state.view(step.target)
    if not step.adds:
        target.zero_()
    for logical, count, padded in step.segments:
        target[..., padded : padded + count] += source[..., logical : logical + count].to(target.dtype)


def store(state: State, step: Store) -> None:
    target = _tensor_view(state, step, step.source)
    for logical, count, padded in step.segments:
        target[..., logical : logical + count] = state.view(step.source)[..., padded : padded + count].to(
            target.dtype
        )


def _tensor_view(state: State, step: Load | Store, place: Map) -> Tensor:
    channels = sum(count for _, count, _ in step.segments)
    size = (state.program.images, place.height, place.width, channels)
    return state.tensors[step.tensor].as_strided(
        size, (step.stride_n, step.stride_h, step.stride_w, step.stride_c)
    )


def stage(state: State, step: Stage) -> None:
    value = _affine(state, state.view(step.source), step.scale, step.shift)
    state.view(step.target).copy_(_activate(value, step.activation))


def _affine(state: State, value: Tensor, scale: int, shift: int) -> Tensor:
    channels = value.shape[-1]
    if scale != NONE:
        value = value * state.vector(scale, channels)
    return value if shift == NONE else value + state.vector(shift, channels)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.none: lambda value: value,
    Activation.relu: torch.relu,
    Activation.relu6: functional.relu6,
    Activation.hardswish: functional.hardswish,
    Activation.hardsigmoid: functional.hardsigmoid,
    Activation.silu: functional.silu,
    Activation.sigmoid: torch.sigmoid,
    Activation.gelu: functional.gelu,
    Activation.leaky_relu: functional.leaky_relu,
    Activation.elu: functional.elu,
    Activation.negative: lambda value: torch.where(value > 0, 0, value),
    Activation.positive: lambda value: torch.where(value > 0, value, 0),
}


def _activate(value: Tensor, activation: Activation) -> Tensor:
    return ACTIVATIONS[activation](value)


def _hand_back(gradient: Tensor, value: Tensor, activation: Activation) -> Tensor:
    """The gradient times the activation's derivative; but for MASKS that is autograd's."""
    if activation == Activation.none:
        return gradient
    if activation == Activation.relu6:
        return torch.where((value > 0) & (value < 6), gradient, 0)
    if activation in MASKS:
        return torch.where(value <= 0, 0, gradient)
    with torch.enable_grad():
        value = value.detach().requires_grad_()
        return torch.autograd.grad(ACTIVATIONS[activation](value), value, gradient)[0]


def _window(
    state: State, base: Map, rows: int, columns: int, strides: tuple[int, int], tap: Tap, channels: int
) -> Tensor:
    """What one tap reads for `rows` x `columns` outputs: (images, rows, columns, channels)."""
    memory, image = state.memory(base.space, base.image)
    size = (state.program.images, rows, columns, channels)
    steps = (image, strides[0] * base.row, strides[1] * base.pixel, 1)
    return memory.as_strided(size, steps, memory.storage_offset() + base.offset + tap.offset)


def _depthwise(state: State, step: Convolve | ConvolveBackward, rows: int, columns: int) -> Tensor:
    channels = step.x.channels
    strides = (step.stride_h, step.stride_w)
    return sum(  # type: ignore[return-value]
        _window(state, step.x, rows, columns, strides, tap, channels)
        * state.vector(step.depthwise_weights + tap.weight * channels, channels)
        for tap in step.depthwise_taps
    )


def convolve(state: State, step: Convolve) -> None:
    rows, columns = step.y.height, step.y.width
    if step.depthwise_taps:
        out = _depthwise(state, step, rows, columns)
        if step.taps:
            out = out @ state.matrix(step.weights, step.x.channels, step.y.channels)
    else:
        size = step.x.channels * step.y.channels
        strides = (step.stride_h, step.stride_w)
        out: Tensor = sum(  # type: ignore[no-redef]
            _window(state, step.x, rows, columns, strides, tap, step.x.channels)
            @ state.matrix(step.weights + tap.weight * size, step.x.channels, step.y.channels)
            for tap in step.taps
        )
    state.view(step.y).copy_(out)
    _moments(state, step.moments, out)


def _moments(state: State, at: int, value: Tensor) -> None:
    """Add the sums of a value and of its square."""
    if at != NONE:
        state.sums.add(at, value)
        state.sums.add_squares(at + value.shape[-1], value)


def _total(state: State, terms: Sequence[Term], constant: int, size: Sequence[int]) -> Tensor:
    total = state.slab.new_zeros(tuple(size))
    for term in terms:
        if state.holds(term.flag):
            total = total + _affine(state, state.view(term.map), term.coefficient, NONE)
    return total if constant == NONE else total + state.vector(constant, total.shape[-1])


def convolve_backward(state: State, step: ConvolveBackward) -> None:
    images, inputs, outputs = state.program.images, step.x.channels, step.y_channels
    dy = _total(state, step.terms, step.constant, (images, step.y_height, step.y_width, outputs))
    strides = (step.stride_h, step.stride_w)
    dd = dy
    if step.depthwise_taps and step.taps:
        d = _depthwise(state, step, step.y_height, step.y_width)
        _add_gradient(state, step, step.gradient, torch.einsum("nhwi,nhwo->io", d, dy))
        dd = dy @ state.matrix(step.weights_transposed, outputs, inputs)
    state.view(step.padded).copy_(dd)
    for tap in step.depthwise_taps:
        window = _window(state, step.x, step.y_height, step.y_width, strides, tap, inputs)
        gradient = (window * dd).sum((0, 1, 2))
        _add_gradient(state, step, step.depthwise_gradient, gradient, tap.weight * inputs)
    if not step.depthwise_taps:
        for tap in step.taps:
            window = _window(state, step.x, step.y_height, step.y_width, strides, tap, inputs)
            gradient = torch.einsum("nhwi,nhwo->io", window, dy)
            _add_gradient(state, step, step.gradient, gradient, tap.weight * inputs * outputs)
    if step.needs_input:
        _input_gradient(state, step)


def _add_gradient(state: State, step: ConvolveBackward, at: int, value: Tensor, offset: int = 0) -> None:
    if at != NONE and state.holds(step.gradient_flag):
        state.gradients[at + offset : at + offset + value.numel()] += value.flatten()


def _input_gradient(state: State, step: ConvolveBackward) -> None:
    dx = state.view(step.dx)
    inputs, outputs = step.x.channels, step.y_channels
    if not step.adds:
        dx.zero_()
    for grid in step.grids:
        part = dx[:, grid.top :: grid.step_h, grid.left :: grid.step_w][:, : grid.rows, : grid.columns]
        for tap in grid.taps:
            window = _window(state, step.padded, grid.rows, grid.columns, (1, 1), tap, step.padded.channels)
            if step.depthwise_taps:
                part += window * state.vector(step.depthwise_weights + tap.weight * inputs, inputs)
            else:
                at = step.weights_transposed + tap.weight * inputs * outputs
                part += window @ state.matrix(at, outputs, inputs)


def _windows(step: Pool | PoolBackward, x: Tensor, fill: float) -> Tensor:
    """(images, height, width, channels, taps) of x padded with `fill`."""
    pads = (0, 0, step.padding_w, step.padding_w, step.padding_h, step.padding_h)
    padded = torch.nn.functional.pad(x, pads, value=fill)
    windows = padded.unfold(1, step.kernel_h, step.stride_h).unfold(2, step.kernel_w, step.stride_w)
    return windows.flatten(-2)


def _divisor(step: Pool | PoolBackward, like: Tensor) -> Tensor | int:
    if step.counts_padding:
        return step.kernel_h * step.kernel_w
    return _windows(step, torch.ones_like(like), 0).sum(-1)


def pool(state: State, step: Pool) -> None:
    x = state.view(step.x)
    if step.is_max:
        windows = _windows(step, x, -float("inf"))
        out, index = torch.where(windows.isnan(), float("inf"), windows).max(-1)
        out = torch.where(windows.isnan().any(-1), float("nan"), out)
        if step.index != NONE:
            state.bytes(step, out.shape).copy_(index)
    else:
        out = _windows(step, x, 0).sum(-1) / _divisor(step, x)
    view = state.view(step.y)
    view.copy_(out[:, : view.shape[1], : view.shape[2]])
    _moments(state, step.moments, out)


def pool_backward(state: State, step: PoolBackward) -> None:
    shape = state.view(step.tile).shape
    dy = _total(state, step.terms, step.constant, shape)
    dx = state.view(step.dx)
    taps = step.kernel_h * step.kernel_w
    if step.is_max:
        index = state.bytes(step, shape).long()
        spread = torch.nn.functional.one_hot(index, taps).to(dy.dtype) * dy[..., None]
    else:
        spread = (dy / _divisor(step, dx))[..., None].expand(*shape, taps)
    height, width = dx.shape[1:3]
    columns = spread.permute(0, 3, 4, 1, 2).reshape(shape[0], -1, shape[1] * shape[2])
    folded = torch.nn.functional.fold(
        columns,
        (height, width),
        (step.kernel_h, step.kernel_w),
        padding=(step.padding_h, step.padding_w),
        stride=(step.stride_h, step.stride_w),
    )
    dx += folded.permute(0, 2, 3, 1)


def combine(state: State, step: Combine) -> None:
    target = state.view(step.target)
    total = _activate(_total(state, step.terms, step.constant, target.shape), step.activation)
    total = target + total if step.adds else total
    target.copy_(total)
    _moments(state, step.moments, total)


def reduce(state: State, step: Reduce) -> None:
    gradient = state.view(step.gradient)
    for term in step.terms:
        if state.holds(term.flag):
            state.sums.add_products(term.coefficient, gradient, state.view(term.map))
    if step.total != NONE:
        state.sums.add(step.total, gradient)


def unstage(state: State, step: Unstage) -> None:
    gradient, source = state.view(step.gradient), state.view(step.source)
    gradient = _hand_back(gradient, _affine(state, source, step.scale, step.shift), step.activation)
    target = state.view(step.target)
    target.copy_(target + gradient if step.adds else gradient)
    if step.moments != NONE:
        state.sums.add(step.moments, gradient)
        state.sums.add_products(step.moments + gradient.shape[-1], gradient, source)


def mask(state: State, step: Mask) -> None:
    gradient = state.view(step.gradient)
    gradient.copy_(_hand_back(gradient, state.view(step.value), step.activation))


def gate(state: State, step: Gate) -> None:
    target = state.view(step.target)
    product = state.view(step.image) * state.view(step.gate)
    product = target + product if step.adds else product
    target.copy_(product)
    _moments(state, step.moments, product)


def gate_gradient(state: State, step: GateGradient) -> None:
    target = state.view(step.target)
    target += (state.view(step.gradient) * state.view(step.image)).sum((1, 2), keepdim=True)


def pick(state: State, step: Pick) -> None:
    source, target = state.view(step.source), state.view(step.target)
    if not step.adds:
        target.zero_()
    numbers = torch.arange(step.count)
    picked = source[..., step.first_source + step.step_source * numbers]
    target.index_add_(-1, step.first_target + step.step_target * numbers, picked)


RUN: dict[type, Callable[[State, Any], None]] = {
    Load: load,
    Store: store,
    Stage: stage,
    Convolve: convolve,
    ConvolveBackward: convolve_backward,
    Pool: pool,
    PoolBackward: pool_backward,
    Combine: combine,
    Reduce: reduce,
    Unstage: unstage,
    Mask: mask,
    Pick: pick,
    Gate: gate,
    GateGradient: gate_gradient,
}
assert Space.slab == 0
