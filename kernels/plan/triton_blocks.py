"""Block sizes of the Triton kernels of plans: few, for every combination is a compilation."""

from __future__ import annotations

from collections.abc import Mapping

Block = Mapping[str, int]
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


def dense_block(outputs: int) -> dict[str, int]:
    """For matrix products of pixels x inputs and inputs x outputs."""
    width = channels_block(outputs)
    pixels = 64 if width > SMALLEST else 128
    return {"BLOCK_P": pixels, "BLOCK_C": width, "BLOCK_I": SMALLEST, "num_warps": 4}


def gradient_block(outputs: int, inputs: int) -> dict[str, int]:
    """For matrix products of inputs x pixels and pixels x outputs."""
    across, down = channels_block(outputs), channels_block(inputs)
    if down == 32 or across == SMALLEST:
        # as wider blocks these spill for compute capability 8.0 or 9.0
        down = SMALLEST
    warps = 8 if across * down == SMALLEST * SMALLEST else 4
    return {"BLOCK_P": 32, "BLOCK_C": across, "BLOCK_I": down, "num_warps": warps}


def add_up_block(is_sums: bool) -> Block:
    """For partial sums: of maps, a few wide, or of weights' gradients."""
    rows, columns = (128, 16) if is_sums else (64, 64)
    return {"BLOCK_R": rows, "BLOCK": columns, "IS_SUMS": is_sums, "num_warps": 4}


def barrier_block(*, packs: bool) -> Block:
    """For barrier operations: a few channels each, or the elements of weights."""
    # one warp: what it reads of a place, all its threads have read before one of them writes there
    return {"BLOCK": 256, "num_warps": 4} if packs else {"BLOCK": 64, "num_warps": 1}
