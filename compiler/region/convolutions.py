"""The steps of a convolution: its taps, the fields both directions share, the staging of what it reads."""

from __future__ import annotations

from typing import Any

from nascompile.compiler.region.ir import Conv
from nascompile.compiler.region.storage import ConvOf, scale_and_shift
from nascompile.compiler.region.tasks import Staged
from nascompile.kernels.plan.steps import NONE, Convolve, Map, Stage, Tap


def taps(op: Conv, row: int, pixel: int, crop: tuple[int, int]) -> tuple[Tap, ...]:
    """Where a convolution reads, from the first pixel of its window."""
    return tuple(
        Tap(
            (i * op.dilation[0] - op.padding[0] + crop[0]) * row
            + (j * op.dilation[1] - op.padding[1] + crop[1]) * pixel,
            i * op.kernel[1] + j,
        )
        for i in range(op.kernel[0])
        for j in range(op.kernel[1])
    )


def conv_fields(one: ConvOf, x: Map) -> dict[str, Any]:
    """The fields that Convolve and ConvolveBackward have in common."""
    reading = taps(one.taps_of, x.row, x.pixel, one.crop)
    has_depthwise = one.depthwise is not None
    pointwise = (Tap(0, 0),) if one.dense is not None else ()
    return {
        "x": x,
        "stride_h": one.taps_of.stride[0],
        "stride_w": one.taps_of.stride[1],
        "depthwise_taps": reading if has_depthwise else (),
        "depthwise_weights": NONE if one.depthwise_weights is None else one.depthwise_weights.offset,
        "taps": pointwise if has_depthwise else reading,
    }


def make_convolve(one: ConvOf, x: Map, y: Map, moments: int) -> Convolve:
    """The forward step."""
    weights = NONE if one.weights is None else one.weights.offset
    return Convolve(y=y, weights=weights, moments=moments, **conv_fields(one, x))


def flops(one: ConvOf) -> int:
    """The FLOPs of one image."""
    pixels = one.value.shape[1] * one.value.shape[2]
    inputs = one.source.channels
    depthwise = 0 if one.depthwise is None else one.depthwise.kernel[0] * one.depthwise.kernel[1] * inputs
    dense = (
        0 if one.dense is None else one.dense.kernel[0] * one.dense.kernel[1] * inputs * one.value.channels
    )
    return 2 * pixels * (depthwise + dense)


def make_stage(staged: Staged, target: Map, flag: int) -> Stage:
    """The step that stages an image."""
    channels = staged.source.channels
    vectors = scale_and_shift(staged.vectors, channels)
    return Stage(staged.source.map(), *vectors, staged.activation, target, flag=flag)
