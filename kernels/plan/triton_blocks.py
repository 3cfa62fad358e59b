"""Block sizes of the Triton kernels of plans: few, for every combination is a compilation."""

from __future__ import annotations

from collections.abc import Mapping

Block = Mapping[str, int | bool | str]
"""The constants a kernel is compiled with, and num_warps."""

SMALLEST = 16
"""Channels are a multiple of it, so that no block needs a mask for channels."""
_ELEMENTS = 2048  # of a tile; four warps hold 16 a thread of each map


def channels_block(channels: int) -> int:
    """The widest block that channels are a whole number of."""
    return next(width for width in (64, 32, SMALLEST) if channels % width == 0)


def block_of(channels: int) -> dict[str, int]:
    """For kernels that go over the pixels of a map."""
    width = channels_block(channels)
    return {"BLOCK_P": _ELEMENTS // width, "BLOCK_C": width, "num_warps": 4}


def dense_block(outputs: int, inputs: int) -> dict[str, int]:
    """For matrix products of pixels x inputs and inputs x outputs."""
    width = channels_block(outputs)
    pixels = 64 if width > SMALLEST else 128
    return {"BLOCK_P": pixels, "BLOCK_C": width, "BLOCK_I": min(32, channels_block(inputs)), "num_warps": 4}


def gradient_block(outputs: int, inputs: int) -> dict[str, int]:
    """For matrix products of inputs x pixels and pixels x outputs."""
    widths = {"BLOCK_C": channels_block(outputs), "BLOCK_I": channels_block(inputs)}
    return {"BLOCK_P": 32, **widths, "num_warps": 4}
