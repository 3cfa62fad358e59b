"""Carries out a program: on the CPU with the C++ executor, cpu.py, on a GPU with Triton, cuda.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nascompile.kernels import native
from nascompile.kernels.plan import cpu, cuda
from nascompile.kernels.plan.program import Program

_PREPARED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the encoded program, what runs it."""


def why_not_native(device: torch.device) -> str | None:
    """Why programs cannot be run on the device, or None."""
    return native.why_not_cpu(device) if device.type != "cuda" else cuda.why_not(device)


def lane(device: torch.device | None = None) -> int:
    """What the kernels in use want channels padded to; RuntimeError without the extension."""
    return cuda.LANE if device is not None and device.type == "cuda" else cpu.extension().lane()


def work_size(program: Program, encoded: Tensor, device: torch.device) -> int:
    """Floats of work memory that `run` needs on the device."""
    return prepared(program, encoded, device).work if device.type == "cuda" else program.work


def run(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    """Carry out `program` on its memory, in place, on the slab's device.

    encoded: `encode(program)`, on the CPU. slab: fp32, work: fp32 of at least `work_size` elements, both
    contiguous and 64-byte aligned. flags: uint8, on the CPU. tensors: what steps and barrier operations
    number; fp32, counters int64; all but the flags on one device. RuntimeError without the extension or where
    memory does not fit.
    """
    ready = prepared(program, encoded, slab.device) if slab.is_cuda else _prepared_for_cpu(encoded)
    ready.run(slab, work, flags, tensors)


def run_timed(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """The same as `run` on the CPU; returns the seconds of every operation by chunk: fp64, (chunks,
    operations).

    Operations are counted phase by phase, barrier operations first; zero for those whose flags do not hold.
    """
    ready = _prepared_for_cpu(encoded)
    operations = ready.under(flags).native.operations
    seconds = torch.zeros(program.chunks, operations, dtype=torch.float64)
    ready.run(slab, work, flags, tensors, seconds)
    return seconds


def prepared(program: Program, encoded: Tensor, device: torch.device) -> cuda.Prepared:
    """What runs a program on a GPU: made when it is first asked for, and kept as long as `encoded` is."""
    found = _PREPARED.get(encoded)
    if found is None or found.device != device or found.precision != cuda.default_precision():
        found = _PREPARED[encoded] = cuda.prepare(program, device)
    return found


def _prepared_for_cpu(encoded: Tensor) -> cpu.Prepared:
    found = _PREPARED.get(encoded)
    if found is None:
        found = _PREPARED[encoded] = cpu.Prepared(encoded)
    return found
