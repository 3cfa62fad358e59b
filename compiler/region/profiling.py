"""How long each operation of the plans takes, while someone asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nascompile.compiler.region.owners import Part, direction_parts
from nascompile.compiler.region.plan import Direction
from nascompile.compiler.region.show import label
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


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one program of a plan: the seconds of every operation over all threads."""

    name: str
    direction: Direction
    seconds: list[float]

    def parts(self) -> list[tuple[Part, float]]:
        """The operations that ran, and how long on the clock: seconds shared out among the threads."""
        chunks = self.direction.program.chunks
        timed = zip(direction_parts(self.name, self.direction), self.seconds, strict=True)
        # zero: its flag did not hold
        return [(part, seconds / chunks) for part, seconds in timed if seconds]


@dataclass(slots=True)
class Profile:
    """What the operations of all runs took; printed as a table of the costliest."""

    runs: list[Run] = field(default_factory=list)

    def add(self, name: str, direction: Direction, seconds: Tensor) -> None:
        """The times of one run, "forward" or "backward": (chunks, operations)."""
        self.runs.append(Run(name, direction, seconds.sum(0).tolist()))

    @property
    def entries(self) -> dict[tuple[str, str], Entry]:
        """By direction and label, what the operations took."""
        found: dict[tuple[str, str], Entry] = {}
        for run in self.runs:
            program = run.direction.program
            for part, seconds in run.parts():
                entry = found.setdefault((run.name, label(part.operation)), Entry())
                flops, moved = cost(part.operation)
                entry.seconds += seconds * program.chunks
                entry.calls += 1
                entry.flops += program.images * flops
                entry.bytes += program.images * moved
        return found

    def table(self, most: int = 40) -> str:
        """The costliest operations as text, a line each."""
        entries = self.entries
        if not entries:
            return "no plan ran in C++"
        whole = sum(entry.seconds for entry in entries.values())
        lines = [f"{'share':>6} {'ms':>8} {'calls':>6} {'GFLOP/s':>8} {'GB/s':>6}  operation"]
        ordered = sorted(entries.items(), key=lambda item: -item[1].seconds)
        for (direction, name), entry in ordered[:most]:
            rates = entry.flops / entry.seconds / 1e9, entry.bytes / entry.seconds / 1e9
            lines.append(
                f"{entry.seconds / whole:6.1%} {1e3 * entry.seconds:8.2f} {entry.calls:6} "
                f"{rates[0]:8.1f} {rates[1]:6.1f}  {direction}: {name}"
            )
        if len(ordered) > most:
            rest = sum(entry.seconds for _, entry in ordered[most:])
            lines.append(f"{rest / whole:6.1%} {1e3 * rest:8.2f} {'':22}  {len(ordered) - most} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


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


def profile(step: Callable[[], object], *, rounds: int = 3) -> Profile:
    """Where the time of a training step goes: runs `step` once unseen, then `rounds` times, and takes the
    seconds of every operation of all plans of compiled models inside.

    The result prints as a table: share, milliseconds over all rounds and threads, rates, shapes. Plans on
    GPUs are not seen.
    """
    step()
    with profiling() as found:
        for _ in range(rounds):
            step()
    return found
