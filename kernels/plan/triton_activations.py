"""The activations of plans in Triton, chosen at run time by their numbers in steps.Activation."""

from __future__ import annotations

import triton
import triton.language as tl

from nascompile.kernels.plan.steps import Activation

RELU = tl.constexpr(int(Activation.relu))
RELU6 = tl.constexpr(int(Activation.relu6))
HARDSWISH = tl.constexpr(int(Activation.hardswish))
HARDSIGMOID = tl.constexpr(int(Activation.hardsigmoid))
SILU = tl.constexpr(int(Activation.silu))
SIGMOID = tl.constexpr(int(Activation.sigmoid))
GELU = tl.constexpr(int(Activation.gelu))
LEAKY_RELU = tl.constexpr(int(Activation.leaky_relu))
ELU = tl.constexpr(int(Activation.elu))
NEGATIVE = tl.constexpr(int(Activation.negative))
POSITIVE = tl.constexpr(int(Activation.positive))


@triton.jit
def clip(value, top):
    """The value between 0 and `top`; nan stays nan."""
    value = tl.where(value <= 0, 0.0, value)
    return tl.where(value >= top, top, value)


@triton.jit
def sigmoid(value):
    """1 / (1 + e^-value)."""
    return 1 / (1 + tl.exp(-value))


@triton.jit
def exponential_minus_one(value):
    """e^value - 1 for values up to zero; by its series where the difference would have no digits."""
    series = 1 + value / 7
    for power in tl.static_range(6, 1, -1):  # pyright: ignore[reportGeneralTypeIssues]
        series = 1 + value / power * series
    return tl.where(value > -0.35, value * series, tl.exp(value) - 1)


@triton.jit
def below(value):
    """How much of the normal distribution lies below."""
    return 0.5 * (1 + tl.erf(value * 0.7071067811865476))


@triton.jit
def activate(value, activation):
    """The activation of the value; nan stays nan, but has no positive part."""
    if activation == RELU:
        value = tl.where(value <= 0, 0.0, value)
    elif activation == RELU6:
        value = clip(value, 6.0)
    elif activation == HARDSWISH:
        value = value * clip(value + 3, 6.0) / 6
    elif activation == HARDSIGMOID:
        value = clip(value + 3, 6.0) / 6
    elif activation == SILU:
        value = value * sigmoid(value)
    elif activation == SIGMOID:
        value = sigmoid(value)
    elif activation == GELU:
        value = value * below(value)
    elif activation == LEAKY_RELU:
        value = tl.where(value > 0, value, value * 0.01)
    elif activation == ELU:
        value = tl.where(value > 0, value, exponential_minus_one(value))
    elif activation == NEGATIVE:
        value = tl.where(value > 0, 0.0, value)
    elif activation == POSITIVE:
        value = tl.where(value > 0, value, 0.0)
    return value


@triton.jit
def passes(value, activation):
    """Where relu or relu6 hands its gradient on."""
    stops = (activation > 0) & (value <= 0)
    return ((activation == RELU6) & (value > 0) & (value < 6)) | ((activation != RELU6) & (stops == 0))


@triton.jit
def hand_back(gradient, value, activation):
    """The gradient times the activation's derivative at the value."""
    if activation <= RELU6:
        gradient = tl.where(passes(value, activation), gradient, 0.0)
    elif activation == HARDSWISH:
        slope = tl.where(value >= 3, 1.0, value / 3 + 0.5)
        gradient = tl.where(value <= -3, 0.0, gradient * slope)
    elif activation == HARDSIGMOID:
        gradient = tl.where((value > -3) & (value < 3), gradient / 6, 0.0)
    elif activation == SILU:
        s = sigmoid(value)
        gradient = gradient * s * (1 + value * (1 - s))
    elif activation == SIGMOID:
        s = sigmoid(value)
        gradient = gradient * s * (1 - s)
    elif activation == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        gradient = gradient * (below(value) + value * density)
    elif activation == LEAKY_RELU:
        gradient = tl.where(value > 0, gradient, gradient * 0.01)
    elif activation == ELU:
        gradient = tl.where(value > 0, gradient, gradient * tl.exp(value))
    elif activation == NEGATIVE:
        gradient = tl.where(value > 0, 0.0, gradient)
    elif activation == POSITIVE:
        gradient = tl.where(value > 0, gradient, 0.0)
    return gradient
