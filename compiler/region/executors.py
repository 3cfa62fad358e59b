"""Who carries out plans: on which device, in which type, with which memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nascompile.kernels.plan import reference
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.run import lane, run, why_not_native


@dataclass(frozen=True, slots=True)
class Executor:
    """device: "cpu" or "cuda". dtype: of everything but the sums. lane: channels are padded to a multiple of
    it.

    chunks: how many parts a batch of so many images is shared out among. work: elements of work memory. run:
    carries out a program, given how it is written down, the slab, the work memory, the flags and the tensors.
    why_not: why it cannot be used on this machine, or None.
    """

    name: str
    device: str
    dtype: torch.dtype
    lane: Callable[[], int]
    chunks: Callable[[int], int]
    work: Callable[[Program], int]
    run: Callable[[Program, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], None]
    why_not: Callable[[], str | None]


def _chunks(images: int) -> int:
    return max(1, min(torch.get_num_threads(), images))


def _work(program: Program) -> int:
    return program.work


def _run_reference(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    reference.run(program, slab, flags, tensors)


NATIVE = Executor(
    name="native",
    device="cpu",
    dtype=torch.float32,
    lane=lane,
    chunks=_chunks,
    work=_work,
    run=run,
    why_not=lambda: why_not_native(torch.device("cpu")),
)
REFERENCE = Executor(
    name="reference",
    device="cpu",
    dtype=torch.float64,
    lane=lambda: 8,
    chunks=lambda images: 1,
    work=lambda program: 1,
    run=_run_reference,
    why_not=lambda: None,
)
"""The definition of every step, in fp64: for tests, not for speed."""
EXECUTORS: tuple[Executor, ...] = (NATIVE,)
"""Those that models run on; the first that suits the tensors is taken."""
