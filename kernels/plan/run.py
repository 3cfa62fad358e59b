"""Carries out a program with the C++ executor, csrc/plan.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from nascompile.kernels import native
from nascompile.kernels.plan.program import Program

SCHEMA = (
    "run_plan(Tensor program, Tensor(a!) slab, Tensor(b!) work, Tensor flags, Tensor(c!)[] tensors) -> ()"
)
"""The operator's, as in csrc/ops.cpp."""


def why_not_native(device: torch.device) -> str | None:
    """Why programs cannot be run on the device, or None."""
    return native.why_not_cpu(device)


def lane() -> int:
    """What the kernels in use want channels padded to; RuntimeError without the extension."""
    return _extension().lane()


def run(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    """Carry out `program` on its memory, in place.

    encoded: `encode(program)`. slab: fp32, work: fp32 of at least `program.work` elements, both contiguous
    and 64-byte aligned. flags: uint8. tensors: what steps and barrier operations number; fp32, counters
    int64. RuntimeError without the extension or where memory does not fit.
    """
    _extension()
    torch.ops.nascompile.run_plan(encoded, slab, work, flags, tensors)


def _extension() -> ModuleType:
    module, reason = native.load()
    if module is None:
        raise RuntimeError(f"a plan cannot be run: {reason}")
    return module
