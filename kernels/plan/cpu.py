"""Carries out a program on the CPU with the C++ executor, csrc/plan_prepared.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from nascompile.kernels import native
from nascompile.kernels.facts import Facts
from nascompile.kernels.plan.program import ALIGNMENT

_KNOWN = 8
"""States of the flags for which a program stays prepared: soft weights have one, sampled paths new ones."""

_TYPES = (torch.float32, torch.int64, torch.float32)
"""By kind of an expected tensor: contiguous numbers, a contiguous counter, images."""
_IMAGES = 2


class Prepared:
    """A program, ready to run: what is the same in all runs under the same flags is found once."""

    def __init__(self, encoded: Tensor) -> None:
        _require("program", encoded, torch.int64, "int64")
        # the same memory, but not the tensor: that one is what tells when this is needed no more
        self._encoded = encoded.detach()
        self._under: dict[bytes, _UnderFlags] = {}

    def run(
        self,
        slab: Tensor,
        work: Tensor,
        flags: Tensor,
        tensors: Sequence[Tensor],
        seconds: Tensor | None = None,
    ) -> None:
        """Carry it out; `run.run` says on what. seconds: as `run.run_timed` returns them, to be added to."""
        for name, memory in (("slab", slab), ("work", work)):
            _require(name, memory, torch.float32, "fp32")
            if memory.data_ptr() % (ALIGNMENT * 4):
                raise RuntimeError(f"run_plan: {name} must begin at a multiple of 64 bytes")
        under = self.under(flags)
        if work.numel() < under.native.work:
            raise RuntimeError(
                f"run_plan: work has {work.numel()} floats, the program needs {under.native.work}"
            )
        under.check(tensors)
        addresses = list(map(Tensor.data_ptr, tensors))
        under.check_memory(addresses)
        clock = 0 if seconds is None else seconds.data_ptr()
        under.native.run(slab.data_ptr(), slab.numel(), work.data_ptr(), addresses, clock)

    def under(self, flags: Tensor) -> _UnderFlags:
        """The program under these flags."""
        _require("flags", flags, torch.uint8, "uint8")
        values = flags.numpy().tobytes()
        found = self._under.get(values)
        if found is None:
            if len(self._under) >= _KNOWN:
                self._under.pop(next(iter(self._under)), None)
            found = self._under[values] = _UnderFlags(self._encoded, flags.clone())
        return found


class _UnderFlags:
    """What runs under some flags, and how the tensors looked that were checked."""

    def __init__(self, encoded: Tensor, flags: Tensor) -> None:
        # the extension has their addresses
        self._kept = encoded, flags
        self.native = extension().Prepared(
            encoded.data_ptr(), encoded.numel(), flags.data_ptr(), flags.numel()
        )
        # thousands of rows, made anew whenever the extension is asked
        self._expected = self.native.expected
        self._used = sorted({number for number, _, least, *_ in self._expected if least})
        self._facts: Facts | None = None
        self._count: int | None = None

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise RuntimeError where the tensors are not what the program expects."""
        if self._facts is not None and len(tensors) == self._count and self._facts.hold(tensors):
            return
        for number, kind, least, sizes, strides in self._expected:
            if number >= len(tensors):
                raise RuntimeError(f"run_plan: the program uses tensor {number}, there are {len(tensors)}")
            _check(number, tensors[number], kind, sizes, strides)
            count = tensors[number].numel()
            if count < least:
                raise RuntimeError(
                    f"run_plan: tensor {number} has {count} elements, the program needs {least}"
                )
        # from the second time on: most sampled paths come once
        self._facts = Facts(tensors) if self._count == len(tensors) else None
        self._count = len(tensors)

    def check_memory(self, addresses: Sequence[int]) -> None:
        """Raise RuntimeError where the storage of a tensor has been taken away (`resize_(0)`)."""
        used = [addresses[number] for number in self._used]
        if 0 in used:
            raise RuntimeError(f"run_plan: tensor {self._used[used.index(0)]} has no memory")


def extension() -> ModuleType:
    """The compiled extension; RuntimeError where it is not there."""
    module, reason = native.load()
    if module is None:
        raise RuntimeError(f"a plan cannot be run: {reason}")
    return module


def _require(name: str, tensor: Tensor, dtype: torch.dtype, words: str) -> None:
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise RuntimeError(f"run_plan: {name} must be a contiguous {words} tensor on the CPU")


def _check(number: int, tensor: Tensor, kind: int, sizes: Sequence[int], strides: Sequence[int]) -> None:
    if not tensor.is_cpu:
        raise RuntimeError(f"run_plan: tensor {number} is not on the CPU")
    if tensor.dtype != _TYPES[kind]:
        raise RuntimeError(
            f"run_plan: tensor {number} must be {'fp32' if _TYPES[kind] is torch.float32 else 'int64'}"
        )
    if kind != _IMAGES:
        if not tensor.is_contiguous():
            raise RuntimeError(f"run_plan: tensor {number} is not contiguous")
    elif tensor.dim() == 4:
        _check_images(number, tensor, sizes, strides)


def _check_images(number: int, tensor: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> None:
    for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        # a program may leave channels out
        fits = tensor.size(dim) == size or (dim == 1 and tensor.size(dim) > size)
        if not fits or (tensor.size(dim) > 1 and tensor.stride(dim) != stride):
            raise RuntimeError(
                f"run_plan: tensor {number} has size {tensor.size(dim)} and stride {tensor.stride(dim)} in "
                f"dimension {dim}, the program expects {size} and {stride}"
            )
