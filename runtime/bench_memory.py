"""The peak memory of one step.

On a GPU the allocator counts. On a CPU the kernel does: Linux keeps the largest resident size of a process,
and `/proc/self/clear_refs` sets that mark back to the present size. So the mark after a step, less the
resident size before it, is what the step needed at its worst, whoever allocated it: torch, a C++ kernel, a
library. Two things would make it too small. Memory that the C library kept from earlier steps is resident
already: here every block of 64 KiB or more is mapped on its own, so that freed memory is gone, and the rest
is given back before the step. And memory that an implementation itself keeps from step to step (ours keeps
slabs): the tensors that are alive between steps and belong to nobody else are added. A sampling thread would
miss short peaks; `ru_maxrss` only ever grows, and compiling needs more than a step.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# mallopt's numbers for its parameters (malloc.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def peak_bytes(step: Callable[[], object], own: Iterable[Tensor], device: torch.device) -> int | None:
    """The most memory that `step()` needs at one time beside the tensors in `own`; None where nobody counts
    it.

    Call it with everything compiled and warm. Includes what is kept between steps.
    """
    gc.collect()
    kept = _kept_bytes(own, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + kept
    if not _CLEAR.exists():
        return None
    give_back_memory()
    _CLEAR.write_text("5")
    resident = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - resident) + kept


def map_large_blocks() -> None:
    """From now on glibc maps blocks of 64 KiB or more on their own, and unmaps them when they are freed."""
    _mallopt(_MMAP_THRESHOLD, 64 * 1024)


def keep_memory() -> None:
    """Stop glibc from returning freed memory: a fresh page costs more than the kernel that writes it.

    A training step reuses its memory; a benchmark that allocates and frees one result at a time would time
    the operating system instead. It holds for all peers alike. Does nothing where there is no glibc.
    """
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    _mallopt(_MMAP_MAX, 0)


def _mallopt(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, ctypes.c_int(value))


def give_back_memory() -> None:
    """Return what is freed to the system, also what `keep_memory` kept."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _kept_bytes(own: Iterable[Tensor], device: torch.device) -> int:
    known = {_place(tensor) for tensor in own}
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # by type(): some objects raise when they are asked for their class; fake tensors have no memory
        if type(thing) in (Tensor, nn.Parameter) and _is_dense(thing, device):
            found[_place(thing)] = thing.untyped_storage().nbytes()
    return sum(size for place, size in found.items() if place not in known)


def _is_dense(tensor: Any, device: torch.device) -> bool:
    return tensor.device.type == device.type and tensor.layout == torch.strided


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
