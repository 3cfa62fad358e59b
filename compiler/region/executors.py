"""Who carries out plans: on which device, in which type, with which memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nascompile.kernels.plan import cuda, reference
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.run import lane, run, why_not_native, work_size


@dataclass(frozen=True, slots=True)
class Executor:
    """device: a kind, "cpu" or "cuda". dtype: of everything but the sums. lane: channels are padded to a
    multiple of it.

    in_turn: whether the steps of a phase are carried out for one image after the other, not for all images
    step by step. chunks: how many parts a batch of so many images is shared out among. work: elements of work
    memory on a device, given a program and how it is written down. run: carries it out, given the slab, the
    work memory, the flags and the tensors too.
    why_not: why it cannot be used on a device of that kind, or None.
    """

    name: str
    device: str
    dtype: torch.dtype
    in_turn: bool
    lane: Callable[[], int]
    chunks: Callable[[int], int]
    work: Callable[[Program, Tensor, torch.device], int]
    run: Callable[[Program, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], None]
    why_not: Callable[[torch.device], str | None]


def _chunks(images: int) -> int:
    return max(1, min(torch.get_num_threads(), images))


def _run_reference(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    reference.run(program, slab, flags, tensors)


NATIVE = Executor(
    name="native",
    device="cpu",
    dtype=torch.float32,
    in_turn=True,
    lane=lane,
    chunks=_chunks,
    work=work_size,
    run=run,
    why_not=why_not_native,
)
REFERENCE = Executor(
    name="reference",
    device="cpu",
    dtype=torch.float64,
    in_turn=True,
    lane=lambda: 8,
    chunks=lambda images: 1,
    work=lambda *_: 1,
    run=_run_reference,
    why_not=lambda device: None,
)
"""The definition of every step, in fp64: for tests, not for speed."""
TRITON = Executor(
    name="triton",
    device="cuda",
    dtype=torch.float32,
    in_turn=False,
    lane=lambda: cuda.LANE,
    # images are independent programs of one launch
    chunks=lambda images: 1,
    work=work_size,
    run=run,
    why_not=why_not_native,
)
EXECUTORS: tuple[Executor, ...] = (NATIVE, TRITON)
"""Those that models run on; the first that suits the tensors is taken."""
