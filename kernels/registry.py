"""What a kernel is: formula, reference, samples, and the implementations that compete for a device.

A fast implementation that cannot be used says why in words; an explicit request that cannot be honoured is
an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to compute a kernel: `why_not(device)` is None where it can be used, else the reason."""

    name: str
    why_not: Callable[[torch.device], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Arguments to judge a kernel with: `make(dtype, device)` is deterministic, its tensors require grad."""

    name: str
    make: Callable[[torch.dtype, torch.device], tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kernel:
    """One operation and everything that tests, benchmarks and `nascompile doctor` need to know about it.

    `function` is the public name (with `implementation=` as its last keyword), `eager` the expression it
    replaces, `operations` gives, for a sample's arguments, the torch operators behind it and the arguments of
    each, `implementations` the candidates in order of preference: the last is the reference, which never
    declines.
    """

    name: str
    formula: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    operations: Callable[..., tuple[tuple[Any, tuple[Any, ...]], ...]]
    samples: Callable[[], tuple[Sample, ...]]
    implementations: tuple[Implementation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of `doctor_report`: whether an implementation is the one used on a device, and if not, why."""

    operation: str
    device: str
    implementation: str
    used: bool
    reason: str


@cache
def choose(kernel: Kernel, device: torch.device, name: str | None = None) -> Implementation:
    """The implementation used on a device: the first that does not decline, or the one asked for by name.

    Raises ValueError for an unknown name and for a named one that declines.
    """
    if name is None:
        return next(found for found in kernel.implementations if found.why_not(device) is None)
    known = {found.name: found for found in kernel.implementations}
    if name not in known:
        raise ValueError(f"{kernel.name}: there is no implementation {name!r}; there are: {', '.join(known)}")
    reason = known[name].why_not(device)
    if reason is not None:
        raise ValueError(f"{kernel.name}: implementation {name!r} cannot be used on {device}: {reason}")
    return known[name]


def report(kernels: tuple[Kernel, ...], device: torch.device) -> list[Row]:
    """For every kernel and implementation: is it the one used on the device, and why not."""
    rows = []
    for kernel in kernels:
        rows += ranked(kernel.name, device, {f.name: f.why_not(device) for f in kernel.implementations})
    return rows


def ranked(operation: str, device: torch.device, reasons: Mapping[str, str | None]) -> list[Row]:
    """A row for each implementation, in order of preference, given why it cannot be used: the first without a
    reason is."""
    used = next(name for name, reason in reasons.items() if reason is None)
    return [
        Row(
            operation=operation,
            device=str(device),
            implementation=name,
            used=name == used,
            reason="used" if name == used else reason or f"{used} comes first",
        )
        for name, reason in reasons.items()
    ]
