"""Carries out programs on a GPU with Triton kernels: everything on the current stream, nothing waits for the
host.

Static shapes and addresses, so a run can be captured into a CUDA graph: it serves every decision with the
same flags. What the flags leave out is not launched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels import capturing
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.triton_blocks import SMALLEST
from nascompile.kernels.plan.triton_launches import Launch
from nascompile.kernels.plan.triton_table import lower
from nascompile.kernels.triton_support import why_not_triton

LANE = SMALLEST
"""What channels are padded to on a GPU."""
_RESERVE = 8  # captures that a prepared program serves
_KNOWN = 16  # sets of addresses whose tables are kept
_DECISIONS = 32  # states of the flags that are remembered


@cache
def why_not(device: torch.device) -> str | None:
    """Why programs cannot be run on the device, or None: every call of a region asks."""
    return why_not_triton(device)


def default_precision() -> str:
    """How matrix products read fp32: "tf32" where torch is allowed to, as for its own convolutions."""
    cudnn: Any = torch.backends.cudnn
    return "tf32" if cudnn.conv.fp32_precision == "tf32" and not _EXACT else "ieee"


_EXACT: list[None] = []


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products read all of fp32 meanwhile, in all threads: backward passes have threads of their
    own."""
    _EXACT.append(None)
    try:
        yield
    finally:
        _EXACT.pop()


@dataclass(frozen=True, slots=True)
class Under:
    """What is launched under a state of the flags: on the device the flags and the table, which lists the
    records that take part."""

    flags: Tensor
    table: Tensor
    calls: list[Callable[[tuple[Tensor, ...], int], None]]


class Prepared:
    """A program on a device: its table, its launches by the state of its flags, and the addresses of the
    tensors of the last runs."""

    def __init__(self, program: Program, device: torch.device, precision: str) -> None:
        lowered = lower(program)
        self.program, self.device, self.precision = program, device, precision
        self.work, self._zeroed = lowered.work, lowered.zeroed
        # a launch's record list is never empty; an empty table would have no address
        self._table = torch.tensor(lowered.words or [0], dtype=torch.int64, device="cpu").to(device)
        self.launches = lowered.launches
        self._under: dict[tuple[int, bytes], Under] = {}
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._reserve: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.Lock()

    def run(self, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]) -> None:
        """Carry out the program in place; all tensors on its device, fp32 but counters (int64); flags (uint8)
        on the CPU.

        `slab` and `work` (of at least `self.work` floats) begin at multiples of 64 bytes.
        """
        self._check(slab, work, flags)
        captures = capturing.is_capturing(self.device)
        under, addresses = self.under(flags), self._addresses(tensors, captures)
        if captures:
            # a graph reads their memory whenever it is replayed
            capturing.hold(self, under, addresses)
        work[: self._zeroed].zero_()
        arguments = (slab, work, under.table, under.flags, addresses)
        with torch.cuda.device(self.device) if slab.is_cuda else nullcontext():
            for call in under.calls:
                call(arguments, self.program.images)

    def under(self, flags: Tensor) -> Under:
        """What is launched under these flags."""
        # what is copied is there for what follows on its stream
        key = (capturing.stream_of(self.device), bytes(flags.numpy()))
        with self._lock:
            found = self._under.pop(key, None)
            if found is None:
                if capturing.is_capturing(self.device):
                    raise RuntimeError("run the program once under this decision before it is captured")
                if len(self._under) >= _DECISIONS:
                    del self._under[next(iter(self._under))]
                found = self._find(flags)
            self._under[key] = found
        return found

    def _find(self, flags: Tensor) -> Under:
        holds, lists, calls = flags.tolist(), list[int](), []
        for launch in self.launches:
            there = [at for at, own in launch.records if all(flag < 0 or holds[flag] for flag in own)]
            if not there:
                continue
            first = launch.first
            if len(there) < len(launch.records):
                first = self._table.numel() + len(lists)
                lists += there
            calls.append(_bind(launch, first, len(there), self.precision))
        table = self._table
        if lists:
            table = torch.cat([table, torch.tensor(lists, dtype=torch.int64, device="cpu").to(self.device)])
        return Under(flags.to(self.device), table, calls)

    def _check(self, slab: Tensor, work: Tensor, flags: Tensor) -> None:
        for name, tensor in (("slab", slab), ("work", work)):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.data_ptr() % 64:
                raise RuntimeError(f"{name} must be fp32, contiguous, and begin at a multiple of 64 bytes")
        if work.numel() < self.work:
            raise RuntimeError(f"work has {work.numel()} floats, the program needs {self.work}")
        for name, tensor in (("slab", slab), ("work", work)):
            if tensor.device.type != self.device.type:
                raise RuntimeError(f"{name} is on {tensor.device}, the program on {self.device}")
        if flags.dtype != torch.uint8 or flags.device.type != "cpu":
            raise RuntimeError(f"flags are {flags.dtype} on {flags.device}, not uint8 on the CPU")

    def _addresses(self, tensors: Sequence[Tensor], captures: bool) -> Tensor:
        """The tensors' addresses on the device."""
        addresses = [tensor.data_ptr() for tensor in tensors] or [0]
        # a copy is there for what follows on its stream
        key = (capturing.stream_of(self.device), *addresses)
        found = self._tables.get(key)
        if found is not None:
            return found
        if self.device.type != "cuda":
            found = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        elif captures:
            # nothing may be allocated on the host now, and the copy is repeated whenever the graph is
            # replayed
            if not self._reserve:
                raise RuntimeError("run the program once before it is captured, at most 8 times per run")
            pair = self._reserve.pop()
            capturing.hold(pair)
            pair[0].copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
            return pair[1].copy_(pair[0], non_blocking=True)
        else:
            host = torch.tensor(addresses, dtype=torch.int64, device="cpu").pin_memory()
            found = host.to(self.device, non_blocking=True)
            while len(self._reserve) < _RESERVE:
                self._reserve.append((torch.zeros_like(host).pin_memory(), torch.zeros_like(found)))
        if len(self._tables) >= _KNOWN:
            del self._tables[next(iter(self._tables))]
        self._tables[key] = found
        return found


def prepare(program: Program, device: torch.device, precision: str | None = None) -> Prepared:
    """The program, ready to run on the device. ValueError where the kernels cannot carry it out.

    precision: of matrix products, "ieee" or "tf32"; None asks torch.backends.
    """
    return Prepared(program, device, precision or default_precision())


def _bind(
    launch: Launch, first: int, records: int, precision: str
) -> Callable[[tuple[Tensor, ...], int], None]:
    function, names = kernels()[launch.kernel]
    options: dict[str, Any] = dict(launch.block)
    if "PRECISION" in names:
        options["PRECISION"] = precision
    # Any: a decorated kernel is typed without the options of its launch
    kernel: Any = function[(*launch.grid[:2], records)]

    def call(arguments: tuple[Tensor, ...], images: int) -> None:
        kernel(*arguments, first, images, **options)

    return call


@cache
def kernels() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """The kernels by name, with the names of their parameters; Triton is imported when one is needed."""
    from nascompile.kernels.plan import (
        triton_barriers,
        triton_convolve,
        triton_gate,
        triton_maps,
        triton_pool,
    )

    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for module in (triton_barriers, triton_convolve, triton_gate, triton_maps, triton_pool):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                found[name.removesuffix("_kernel")] = kernel, tuple(kernel.arg_names)
    return found
