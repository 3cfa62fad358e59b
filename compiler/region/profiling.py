"""How long each operation of the plans takes, while someone asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nascompile.compiler.region.show import label
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.traffic import cost


@dataclass(slots=True)
class Entry:
    """All operations of one label: seconds over all threads, how often they ran, FLOPs and bytes they need.

    Bytes are those of maps, each counted once for every step that reads or writes it.
    """

    seconds: float = 0.0
    calls: int = 0
    flops: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Profile:
    """By direction ("forward", "backward") and label, what the operations took."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def add(self, direction: str, program: Program, seconds: Tensor) -> None:
        """The times of one run: (chunks, operations)."""
        totals = seconds.sum(0).tolist()
        operations = (op for phase in program.phases for op in (*phase.barriers, *phase.steps))
        for operation, total in zip(operations, totals, strict=True):
            if total == 0.0:
                # its flag did not hold
                continue
            entry = self.entries.setdefault((direction, label(operation)), Entry())
            flops, moved = cost(operation)
            entry.seconds += total
            entry.calls += 1
            entry.flops += program.images * flops
            entry.bytes += program.images * moved

    def table(self, most: int = 40) -> str:
        """The costliest operations as text, a line each."""
        whole = sum(entry.seconds for entry in self.entries.values())
        lines = [f"{'share':>6} {'ms':>8} {'calls':>6} {'GFLOP/s':>8} {'GB/s':>6}  operation"]
        ordered = sorted(self.entries.items(), key=lambda item: -item[1].seconds)
        for (direction, name), entry in ordered[:most]:
            rates = entry.flops / entry.seconds / 1e9, entry.bytes / entry.seconds / 1e9
            lines.append(
                f"{entry.seconds / whole:6.1%} {1e3 * entry.seconds:8.2f} {entry.calls:6} "
                f"{rates[0]:8.1f} {rates[1]:6.1f}  {direction}: {name}"
            )
        return "\n".join(lines)


_ACTIVE: ContextVar[Profile | None] = ContextVar("profile", default=None)


def active() -> Profile | None:
    """The profile that is being taken, if there is one."""
    return _ACTIVE.get()


@contextmanager
def profiling() -> Iterator[Profile]:
    """Take a profile of all plans that run inside; seconds are those of threads, so two threads count twice.

    The autograd engine runs backward on CPU tensors in the calling thread, so that both directions are seen.
    """
    profile = Profile()
    token: Any = _ACTIVE.set(profile)
    try:
        yield profile
    finally:
        _ACTIVE.reset(token)
