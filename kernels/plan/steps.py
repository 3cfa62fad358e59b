"""The steps a plan is made of. A plan computes a region of a network, forward or backward, over one slab of
memory.

A program is a list of phases. A phase first runs its barrier operations, once; then its steps, image after
image: images are shared out among chunks (one per thread), and each chunk runs all steps of the phase for one
image before it goes on to its next one. So a step may use what an earlier step of its phase wrote for the
same image, and a barrier may use what earlier phases summed over the whole batch.

Memory, all fp32 unless said otherwise. The *slab* holds the maps (channels last, padded to whole vectors:
with zeros in gradients, else with numbers that nothing depends on), per-channel vectors and packed weights. A
chunk has *sums* (fp64) and *gradients* (fp32) that its images add to, zero at the start of a run, and
*scratch*, zero at the start of a run too: a padded image keeps the zeros around it because no step writes
there.

csrc/plan.h has the same structures, field by field and in the same order; `encode` in program.py writes them
down.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

NONE = -1
"""Stands for an absent offset, tensor or flag."""


class Space(IntEnum):
    """Where a map lies."""

    slab = 0
    scratch = 1


class Activation(IntEnum):
    """What is applied to a value when it is read or written."""

    none = 0
    relu = 1
    relu6 = 2
    hardswish = 3
    hardsigmoid = 4
    silu = 5
    sigmoid = 6
    gelu = 7
    leaky_relu = 8
    elu = 9
    negative = 10
    """min(x, 0): the part below zero of one whose slope there is a parameter."""
    positive = 11
    """The part above, to which nan does not belong."""


MASKS = frozenset((Activation.relu, Activation.relu6))
"""Those whose derivative is one or zero and follows from the output as well as from the input."""


@dataclass(frozen=True, slots=True)
class Map:
    """An image per sample: `width` pixels of `channels` floats in each of `height` rows.

    offset, image, row and pixel are in floats: element (n, h, w, c) is at offset + n*image + h*row + w*pixel
    + c. In scratch, image is 0: every chunk has one. `channels` is a multiple of the lane, as are all
    strides.
    """

    space: Space
    offset: int
    image: int
    row: int
    pixel: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Tap:
    """One tap of a convolution: where it reads, in floats from the pixel's base, and with which weights."""

    offset: int
    weight: int


@dataclass(frozen=True, slots=True)
class Term:
    """coefficient * map: `coefficient` is the slab offset of a per-channel vector, or NONE for one.

    `flag`: index of the run-time flag without which the term is left out, or NONE.
    """

    map: Map
    coefficient: int
    flag: int


@dataclass(frozen=True, slots=True)
class Grid:
    """A rectangle of pixels of the input gradient that one list of taps computes.

    Row i and column j of the grid are pixel (top + i*step_h, left + j*step_w) of the gradient, and its taps
    read `source` at i*source.row + j*source.pixel + tap.offset.
    """

    top: int
    left: int
    step_h: int
    step_w: int
    rows: int
    columns: int
    taps: tuple[Tap, ...]


# ---- steps: what a chunk does for one image ----


@dataclass(frozen=True, slots=True)
class Load:
    """target[h, w, c] (+)= tensor[n, c, h, w]: copies an fp32 torch tensor into a map.

    The strides are the tensor's, in elements. Segments say which channels of the map are the tensor's:
    (first in the tensor, count, first in the map); the others are set to zero, or left as they are with
    `adds`.
    """

    tensor: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int
    segments: tuple[tuple[int, int, int], ...]
    target: Map
    adds: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Store:
    """tensor[n, c, h, w] = source[h, w, c]: the opposite of Load."""

    tensor: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int
    segments: tuple[tuple[int, int, int], ...]
    source: Map
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Stage:
    """target = activation(scale * source + shift), written into the middle of a padded image in scratch.

    scale and shift are slab offsets of per-channel vectors, or NONE. `target` has the size of `source`.
    """

    source: Map
    scale: int
    shift: int
    activation: Activation
    target: Map
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Convolve:
    """A convolution: depthwise, or dense, or depthwise followed by pointwise without storing what is between.

    d[h, w, c] = sum over depthwise taps t of depthwise_weights[t.weight, c] * x[base(h, w) + t.offset + c]
    y[h, w, o] = sum over taps t and channels i of weights[t.weight, i, o] * (d or x)[base(h, w) + t.offset +
    i]

    base(h, w) = h*stride_h*x.row + w*stride_w*x.pixel. With both, `taps` is one tap at offset 0 on d. With
    depthwise taps alone (taps empty) y = d. Weights lie in the slab: depthwise [tap][x.channels], dense
    [tap][x.channels] [y.channels]. `moments`: offset in the sums of y's [sum][sum of squares], each
    y.channels fp64, or NONE.
    """

    x: Map
    y: Map
    stride_h: int
    stride_w: int
    depthwise_taps: tuple[Tap, ...]
    depthwise_weights: int
    taps: tuple[Tap, ...]
    weights: int
    moments: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class ConvolveBackward:
    """The gradients of Convolve, given dy = sum of terms + constant (a per-channel vector, or NONE).

    x is what forward read; d is computed again. `padded` is a padded image in scratch of the size of y
    (channels of x if there is a depthwise part, else of y): what the transposed taps read, dd = dy *
    pointwise^T or dy itself. dx (in scratch, size of the unpadded x, or NONE-space with `needs_input` 0) (+)=
    for every grid, for its pixels, sum over the grid's taps of weights * padded. `weights_transposed`
    [tap][y.channels][x.channels]. depthwise_gradient [tap][x.channels] and gradient
    [tap][x.channels][y.channels] are offsets in the chunk's gradients, or NONE where not needed.

    `gradient_flag`: the flag without which the gradients of the weights are left out; always NONE in programs
    for the CPU, where two steps stand for the two cases, and not written down by `encode`.
    """

    x: Map
    y_height: int
    y_width: int
    y_channels: int
    stride_h: int
    stride_w: int
    depthwise_taps: tuple[Tap, ...]
    depthwise_weights: int
    taps: tuple[Tap, ...]
    weights_transposed: int
    terms: tuple[Term, ...]
    constant: int
    padded: Map
    grids: tuple[Grid, ...]
    dx: Map
    needs_input: int
    adds: int
    depthwise_gradient: int
    gradient: int
    flag: int = NONE
    gradient_flag: int = NONE


@dataclass(frozen=True, slots=True)
class Pool:
    """Max or average pooling; padding never wins a maximum; it counts in the average with `counts_padding`.

    `index`: for the maximum, offset (floats) in the slab of one byte per element of y, image after image,
    dense: the number i*kernel_w + j of the window's first maximum; `index_image` is the floats from one image
    to the next. NONE where there is no backward.
    """

    x: Map
    y: Map
    is_max: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    counts_padding: int
    index: int
    index_image: int
    moments: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class PoolBackward:
    """dx += the gradient of Pool, given dy = sum of terms + constant. `tile` is scratch of the size of y."""

    terms: tuple[Term, ...]
    constant: int
    tile: Map
    dx: Map
    is_max: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    counts_padding: int
    index: int
    index_image: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Combine:
    """target (+)= activation(sum of terms + constant); zero where there is nothing to sum. `moments` as in
    Convolve."""

    terms: tuple[Term, ...]
    constant: int
    activation: Activation
    target: Map
    adds: int
    moments: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Reduce:
    """Sums over pixels, per channel: of gradient * map for every term, and of the gradient itself.

    A term's `coefficient` is the offset in the sums (channels fp64); `total` that of the plain sum, or NONE.
    """

    gradient: Map
    terms: tuple[Term, ...]
    total: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Unstage:
    """The gradient of Stage: g = gradient * activation'(scale * source + shift); target (+)= g.

    `target` may be `gradient`. `moments`: offset in the sums of [sum of g][sum of g * source], or NONE. The
    derivative of ReLU at 0 is 0, that of ReLU6 at 0, 6 and nan as well. GELU is that of the normal
    distribution, the slope of LeakyReLU 0.01, ELU's alpha 1.
    """

    gradient: Map
    source: Map
    scale: int
    shift: int
    activation: Activation
    target: Map
    adds: int
    moments: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Mask:
    """gradient *= activation'(value), in place, where `value` is the output of one of MASKS."""

    gradient: Map
    value: Map
    activation: Activation
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Pick:
    """target[..., first_target + i*step_target] (+)= source[..., first_source + i*step_source] for i < count.

    Some channels of an image, or with `adds` their gradient's way back. Without `adds` the other channels of
    the target become zero. A step of zero in the source repeats one channel, in the target it sums many.
    """

    source: Map
    target: Map
    first_source: int
    step_source: int
    first_target: int
    step_target: int
    count: int
    adds: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Gate:
    """target (+)= image * gate, where `gate` has the size of the image or one pixel. `moments` as in
    Convolve."""

    image: Map
    gate: Map
    target: Map
    adds: int
    moments: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class GateGradient:
    """target += sum over pixels of gradient * image: the gradient of a gate of one pixel."""

    gradient: Map
    image: Map
    target: Map
    flag: int = NONE


# ---- barrier operations: what happens once, between phases ----


@dataclass(frozen=True, slots=True)
class PackDepthwise:
    """slab[target + tap*channels + c] = tensor[c, 0, tap], zero for padded channels."""

    tensor: int
    count: int
    segments: tuple[tuple[int, int, int], ...]
    channels: int
    target: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class PackDense:
    """slab[target + (tap*in + i)*out + o] = tensor[o, i, tap], and transposed [tap][out][in]; zero where
    padded.

    `target` or `transposed` may be NONE. Segments map the tensor's input and output channels to padded ones.
    """

    tensor: int
    count: int
    in_segments: tuple[tuple[int, int, int], ...]
    out_segments: tuple[tuple[int, int, int], ...]
    in_channels: int
    out_channels: int
    target: int
    transposed: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class UnpackDepthwise:
    """tensor[c, 0, tap] = sum over chunks, in order, of gradients[source + tap*channels + c]; on the CPU
    these are zero again afterwards."""

    source: int
    count: int
    segments: tuple[tuple[int, int, int], ...]
    channels: int
    tensor: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class UnpackDense:
    """tensor[o, i, tap] = sum over chunks, in order, of gradients[source + (tap*in + i)*out + o]; on the CPU
    these are zero again afterwards."""

    source: int
    count: int
    in_segments: tuple[tuple[int, int, int], ...]
    out_segments: tuple[tuple[int, int, int], ...]
    in_channels: int
    out_channels: int
    tensor: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Normalise:
    """BatchNorm's per-channel vectors, in the slab: mean, inverse deviation, scale and shift, `channels`
    floats each.

    scale = gamma / sqrt(var + eps), shift = beta - mean * scale. With `moments` (offset in the sums:
    [sum][sum of squares] over `elements` values a channel) batch statistics, and running statistics are
    updated where given: running = (1 - momentum) * running + momentum * batch, the variance unbiased;
    momentum < 0 means the average over all batches, by the counter (int64 tensor), which is incremented
    first. Without moments the running statistics are used, or mean 0 and variance 1 where there are none.
    gamma, beta, mean, var, counter: tensor numbers or NONE. Padded channels get zeros in scale and shift.
    `out`: slab offset of [mean][inverse][scale][shift].
    """

    moments: int
    elements: int
    epsilon: float
    momentum: float
    gamma: int
    beta: int
    running_mean: int
    running_var: int
    counter: int
    segments: tuple[tuple[int, int, int], ...]
    channels: int
    out: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Weighted:
    """One term of a weighted sum, for Coefficients: weight * (scale * map + shift).

    weight: index in the decision tensor, or NONE for one. scale, shift: slab offsets, or NONE for one and
    zero. out: slab offset of the coefficient vector weight * scale.
    """

    weight: int
    scale: int
    shift: int
    out: int
    flag: int


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The vectors of a Combine: `out` of every term, and `constant` = sum of weight * shift, or NONE."""

    terms: tuple[Weighted, ...]
    decision: int
    constant: int
    channels: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class Upstream:
    """A gradient that reaches a BatchNorm's output: weight * g, with sums over the batch.

    sum_g and sum_gy: offsets in the sums of sum(g) and sum(g * y) per channel. out: slab offset of the
    coefficient vector of g in dy, weight * scale; NONE if it is not needed.
    """

    weight: int
    sum_g: int
    sum_gy: int
    out: int
    flag: int


@dataclass(frozen=True, slots=True)
class NormaliseBackward:
    """The vectors with which dy = sum of out_k * g_k + by_y * y + constant, and the gradients of gamma and
    beta.

    With G = sum of weight_k * sum_g, H = inverse * (sum of weight_k * sum_gy - mean * G): dgamma = H, dbeta =
    G and, with batch statistics (`elements` > 0), by_y += -scale * inverse * H / elements and constant +=
    -scale * G / elements - (that by_y) * mean. `vectors` is Normalise's out. by_y and constant are added to:
    several BatchNorms may share one y (the first has `starts` 1 and sets them). gamma, beta: numbers of the
    gradient tensors, which are added to, or NONE. Where no upstream takes part there is no gradient: nothing
    is read, and what `starts` is zero.
    """

    vectors: int
    elements: int
    upstream: tuple[Upstream, ...]
    decision: int
    by_y: int
    constant: int
    starts: int
    gamma: int
    beta: int
    segments: tuple[tuple[int, int, int], ...]
    channels: int
    flag: int = NONE


@dataclass(frozen=True, slots=True)
class DecisionGradient:
    """tensor[weight] += sum over channels of scale * sum_gy + shift * sum_g. scale, shift: slab, NONE: one,
    zero."""

    weight: int
    sum_g: int
    sum_gy: int
    scale: int
    shift: int
    channels: int
    tensor: int
    flag: int = NONE


STEPS = (
    Load,
    Store,
    Stage,
    Convolve,
    ConvolveBackward,
    Pool,
    PoolBackward,
    Combine,
    Reduce,
    Unstage,
    Mask,
    Pick,
    Gate,
    GateGradient,
)
BARRIERS = (
    PackDepthwise,
    PackDense,
    UnpackDepthwise,
    UnpackDense,
    Normalise,
    Coefficients,
    NormaliseBackward,
    DecisionGradient,
)
Step = (
    Load
    | Store
    | Stage
    | Convolve
    | ConvolveBackward
    | Pool
    | PoolBackward
    | Combine
    | Reduce
    | Unstage
    | Mask
    | Pick
    | Gate
    | GateGradient
)
Barrier = (
    PackDepthwise
    | PackDense
    | UnpackDepthwise
    | UnpackDense
    | Normalise
    | Coefficients
    | NormaliseBackward
    | DecisionGradient
)
