"""The definition of every barrier operation in plain torch; see reference.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels.plan.state import State
from nascompile.kernels.plan.steps import (
    NONE,
    Coefficients,
    DecisionGradient,
    Normalise,
    NormaliseBackward,
    PackDense,
    PackDepthwise,
    UnpackDense,
    UnpackDepthwise,
)

Segments = Sequence[tuple[int, int, int]]


def pack_depthwise(state: State, op: PackDepthwise) -> None:
    packed = state.matrix(op.target, op.count, op.channels)
    packed.zero_()
    weights = state.tensors[op.tensor].detach().flatten(1)
    for logical, count, padded in op.segments:
        packed[:, padded : padded + count] = weights[logical : logical + count].t().to(packed.dtype)


def _by_taps(weights: Tensor) -> Tensor:
    """(outputs, inputs, taps) of a convolution's weights, or of a linear layer's, which have one tap."""
    return weights[..., None].flatten(2)


def pack_dense(state: State, op: PackDense) -> None:
    size = op.count * op.in_channels * op.out_channels
    weights = _by_taps(state.tensors[op.tensor].detach())
    packed = state.slab.new_zeros(op.count, op.in_channels, op.out_channels)
    for source, inputs, i in op.in_segments:
        for target, outputs, o in op.out_segments:
            block = weights[target : target + outputs, source : source + inputs]
            packed[:, i : i + inputs, o : o + outputs] = block.permute(2, 1, 0).to(packed.dtype)
    if op.target != NONE:
        state.slab[op.target : op.target + size] = packed.flatten()
    if op.transposed != NONE:
        state.slab[op.transposed : op.transposed + size] = packed.transpose(1, 2).flatten()


def unpack_depthwise(state: State, op: UnpackDepthwise) -> None:
    packed = state.gradients[op.source : op.source + op.count * op.channels].view(op.count, op.channels)
    target = state.tensors[op.tensor].flatten(1)
    for logical, count, padded in op.segments:
        target[logical : logical + count] = packed[:, padded : padded + count].t().to(target.dtype)
    packed.zero_()


def unpack_dense(state: State, op: UnpackDense) -> None:
    size = op.count * op.in_channels * op.out_channels
    packed = state.gradients[op.source : op.source + size].view(op.count, op.in_channels, op.out_channels)
    target = _by_taps(state.tensors[op.tensor])
    for source, inputs, i in op.in_segments:
        for first, outputs, o in op.out_segments:
            block = packed[:, i : i + inputs, o : o + outputs].permute(2, 1, 0)
            target[first : first + outputs, source : source + inputs] = block.to(target.dtype)
    packed.zero_()


def normalise(state: State, op: Normalise) -> None:
    if op.moments == NONE:
        mean = _spread(state, op.running_mean, op.segments, op.channels)
        variance = _spread(state, op.running_var, op.segments, op.channels, 1.0)
    else:
        mean = state.sums.total(op.moments, op.channels) / op.elements
        variance = state.sums.variance(op.moments + op.channels, mean, op.elements)
        _update_running(state, op, mean, variance)
    present = _spread(state, NONE, op.segments, op.channels, 1.0) > 0
    inverse = torch.where(present, (variance + op.epsilon).rsqrt(), 0)
    gamma = _spread(state, op.gamma, op.segments, op.channels, 1.0)
    beta = _spread(state, op.beta, op.segments, op.channels, 0.0)
    scale = gamma * inverse
    shift = beta - mean * scale
    state.slab[op.out : op.out + 4 * op.channels] = torch.cat([mean, inverse, scale, shift]).to(
        state.slab.dtype
    )


def _spread(state: State, tensor: int, segments: Segments, channels: int, missing: float = 0.0) -> Tensor:
    """A tensor's values in padded channels, fp64; padded ones are zero."""
    out = torch.zeros(channels, dtype=torch.float64)
    for logical, count, padded in segments:
        values = (
            missing if tensor == NONE else state.tensors[tensor].detach()[logical : logical + count].double()
        )
        out[padded : padded + count] = values
    return out


def _update_running(state: State, op: Normalise, mean: Tensor, variance: Tensor) -> None:
    momentum = op.momentum
    if op.counter != NONE:
        state.tensors[op.counter] += 1
        if momentum < 0:
            momentum = 1 / float(state.tensors[op.counter])
    if op.running_mean == NONE:
        return
    unbiased = variance * op.elements / max(op.elements - 1, 1)
    for tensor, batch in ((op.running_mean, mean), (op.running_var, unbiased)):
        for logical, count, padded in op.segments:
            running = state.tensors[tensor][logical : logical + count]
            running.mul_(1 - momentum).add_((momentum * batch[padded : padded + count]).to(running.dtype))


def _weight(state: State, decision: int, index: int) -> float:
    return 1.0 if index == NONE else float(state.tensors[decision][index])


def coefficients(state: State, op: Coefficients) -> None:
    constant = state.slab.new_zeros(op.channels)
    for term in op.terms:
        if not state.holds(term.flag):
            continue
        weight = _weight(state, op.decision, term.weight)
        if term.out != NONE:
            scale = 1.0 if term.scale == NONE else state.vector(term.scale, op.channels)
            state.slab[term.out : term.out + op.channels] = scale * weight
        if term.shift != NONE:
            constant = constant + state.vector(term.shift, op.channels) * weight
    if op.constant != NONE:
        state.slab[op.constant : op.constant + op.channels] = constant


def normalise_backward(state: State, op: NormaliseBackward) -> None:
    channels = op.channels
    if not any(state.holds(one.flag) for one in op.upstream):
        for at in (op.by_y, op.constant):
            if at != NONE and op.starts:
                state.vector(at, channels).zero_()
        return
    mean, inverse, scale, _ = (state.vector(op.vectors + k * channels, channels).double() for k in range(4))
    total = torch.zeros(channels, dtype=torch.float64)
    product = torch.zeros(channels, dtype=torch.float64)
    for one in op.upstream:
        if not state.holds(one.flag):
            continue
        weight = _weight(state, op.decision, one.weight)
        total += weight * state.sums.total(one.sum_g, channels)
        product += weight * state.sums.products(one.sum_gy, mean)
        if one.out != NONE:
            state.slab[one.out : one.out + channels] = (scale * weight).to(state.slab.dtype)
    by_normalised = inverse * product
    for tensor, values in ((op.gamma, by_normalised), (op.beta, total)):
        for logical, count, padded in op.segments if tensor != NONE else ():
            gradient = state.tensors[tensor]
            gradient[logical : logical + count] += values[padded : padded + count].to(gradient.dtype)
    if op.by_y == NONE:
        return
    if op.elements > 0:
        by_y = -scale * inverse * by_normalised / op.elements
        constant = -scale * total / op.elements - by_y * mean
    else:
        by_y = constant = torch.zeros(channels, dtype=torch.float64)
    for at, values in ((op.by_y, by_y), (op.constant, constant)):
        before = 0 if op.starts else state.vector(at, channels)
        state.slab[at : at + channels] = before + values.to(state.slab.dtype)


def decision_gradient(state: State, op: DecisionGradient) -> None:
    ones, zeros = torch.ones(op.channels, dtype=torch.float64), torch.zeros(op.channels, dtype=torch.float64)
    scale = ones if op.scale == NONE else state.vector(op.scale, op.channels).double()
    amount = (scale * state.sums.products(op.sum_gy, zeros)).sum()
    if op.shift != NONE:
        shift = state.vector(op.shift, op.channels).double()
        amount = amount + (shift * state.sums.total(op.sum_g, op.channels)).sum()
    target = state.tensors[op.tensor]
    target[op.weight] += amount.to(target.dtype)


RUN: dict[type, Callable[[State, Any], None]] = {
    PackDepthwise: pack_depthwise,
    PackDense: pack_dense,
    UnpackDepthwise: unpack_depthwise,
    UnpackDense: unpack_dense,
    Normalise: normalise,
    Coefficients: coefficients,
    NormaliseBackward: normalise_backward,
    DecisionGradient: decision_gradient,
}
