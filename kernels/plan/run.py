"""Carries out a program: on the CPU with the C++ executor, csrc/plan.cpp, on a GPU with Triton, cuda.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nascompile.kernels import native
from nascompile.kernels.plan import cuda
from nascompile.kernels.plan.program import Program

SCHEMA = (
    "run_plan(Tensor program, Tensor(a!) slab, Tensor(b!) work, Tensor flags, Tensor(c!)[] tensors) -> ()"
)
"""The operator's, as in csrc/ops.cpp."""


_PREPARED = WeakTensorKeyDictionary()
"""By the encoded program, what runs it on a GPU."""


def why_not_native(device: torch.device) -> str | None:
    """Why programs cannot be run on the device, or None."""
    return native.why_not_cpu(device) if device.type != "cuda" else cuda.why_not(device)


def lane(device: torch.device | None = None) -> int:
    """What the kernels in use want channels padded to; RuntimeError without the extension."""
    return cuda.LANE if device is not None and device.type == "cuda" else _extension().lane()


def work_size(program: Program, device: torch.device) -> int:
    """Floats of work memory that `run` needs on the device."""
    return cuda.work_size(program) if device.type == "cuda" else program.work


def run(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    """Carry out `program` on its memory, in place, on the slab's device.

    encoded: `encode(program)`, on the CPU. slab: fp32, work: fp32 of at least `work_size` elements, both
    contiguous and 64-byte aligned. flags: uint8. tensors: what steps and barrier operations number; fp32,
    counters int64; all on one device. RuntimeError without the extension or where memory does not fit.
    """
    if slab.is_cuda:
        prepared(program, encoded, slab.device).run(slab, work, flags, tensors)
        return
    _extension()
    torch.ops.nascompile.run_plan(encoded, slab, work, flags, tensors)


def run_timed(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """The same as `run` on the CPU; returns the seconds of every operation by chunk: fp64, (chunks,
    operations).

    Operations are counted phase by phase, barrier operations first; zero for those whose flags do not hold.
    """
    _extension()
    operations = sum(len(phase.barriers) + len(phase.steps) for phase in program.phases)
    seconds = torch.zeros(program.chunks, operations, dtype=torch.float64)
    torch.ops.nascompile.profile_plan(encoded, slab, work, flags, tensors, seconds)
    return seconds


def prepared(program: Program, encoded: Tensor, device: torch.device) -> cuda.Prepared:
    """What runs a program on a GPU: made when it is first asked for, and kept as long as `encoded` is."""
    found = _PREPARED.get(encoded)
    if found is None or found.device != device or found.precision != cuda.default_precision():
        found = _PREPARED[encoded] = cuda.prepare(program, device)
    return found


def _extension() -> ModuleType:
    module, reason = native.load()
    if module is None:
        raise RuntimeError(f"a plan cannot be run: {reason}")
    return module
