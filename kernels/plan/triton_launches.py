"""Launches of Triton kernels for a program: phases, barrier operations, and the sums of partial sums.

Every image has its own scratch, as in reference.State. Sums over pixels go through partial sums: every step
of a phase has a part of work memory for them, and launches at the end of the phase add them up in a fixed
order.
The barrier operations of a phase are carried out kind by kind, many in one launch: none reads what an
operation of a later kind writes. Those that write the same place go to different launches, in order.
Steps become jobs, and those that do not wait for one another go into one launch (triton_schedule.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nascompile.kernels.plan.program import Phase, Program, aligned
from nascompile.kernels.plan.steps import (
    NONE,
    Coefficients,
    DecisionGradient,
    Map,
    Normalise,
    NormaliseBackward,
    PackDense,
    PackDepthwise,
    Step,
    Tap,
    UnpackDense,
    UnpackDepthwise,
)
from nascompile.kernels.plan.triton_areas import Area, map_area
from nascompile.kernels.plan.triton_blocks import SMALLEST, Block, add_up_block, barrier_block
from nascompile.kernels.plan.triton_records import Table, rounds, written_by
from nascompile.kernels.plan.triton_schedule import Job, schedule

ORDER = (
    *(PackDepthwise, PackDense, Normalise, Coefficients),
    *(NormaliseBackward, UnpackDepthwise, UnpackDense, DecisionGradient),
)
"""The kinds of barrier operations, in an order in which those of one phase may be carried out."""
PLACES = 1 << 24
"""Floats of work memory that the gradients of a phase may take for themselves."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, its block sizes, its grid, and where the list of its records begins. `name`: what they are
    for. `records`: where each lies, and the flags that have to hold for it."""

    kernel: str
    block: Block
    grid: tuple[int, int, int]
    first: int
    name: str
    records: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Lowered:
    """The launches of a program, their table, and work memory: its floats, and how many are zero at the
    start."""

    launches: tuple[Launch, ...]
    words: list[int]
    zeroed: int
    work: int


@dataclass(slots=True)
class Entry:
    """Partial sums of a step: rows x columns at `partials`, `width` apart, and where they go. All counts in
    doubles for sums (`is_sums`), in floats for gradients."""

    flags: tuple[int, int]
    partials: int
    rows: int
    width: int
    columns: int
    target: int
    is_sums: bool


class Places:
    """Memory for the gradients of a phase: each has a place of its own until `PLACES` floats are taken, then
    they take turns."""

    def __init__(self, take: Callable[[int], int]) -> None:
        self._take = take
        self._known: list[tuple[int, int]] = []

    def take(self, floats: int) -> int:
        fitting = [place for place in self._known if place[1] >= floats]
        if fitting and sum(size for _, size in self._known) + floats > PLACES:
            # the one taken longest ago
            self._known.remove(fitting[0])
            self._known.append(fitting[0])
            return fitting[0][0]
        self._known.append((self._take(floats), floats))
        return self._known[-1][0]


class Launches:
    """The launches of a program so far. Steps are lowered by `lower_step`, which is not known here."""

    def __init__(self, program: Program) -> None:
        self.program, self.images = program, program.images
        self.launches: list[Launch] = []
        self.gradients = aligned(2 * program.sums)
        scratch, scratch_image = self.gradients + aligned(program.gradients), aligned(program.scratch)
        self.table = Table(self.gradients, scratch, scratch_image)
        self.zeroed = scratch + self.images * scratch_image
        self.top = self.next = self.zeroed
        self.places = Places(self.take)
        self.entries: list[Entry] = []
        self.jobs: list[Job] = []

    def launch(
        self, kernel: str, block: Block, grid: tuple[int, int], records: Sequence[Sequence[int]], name: str
    ) -> None:
        places = [self.table.add(record) for record in records]
        # every record begins with its flag, and that of a sum of partial sums with two
        count = 2 if kernel == "add_up" else 1
        found = tuple((at, tuple(record[:count])) for at, record in zip(places, records, strict=True))
        self.launches.append(
            Launch(kernel, block, (*grid, len(records)), self.table.add(places), name, found)
        )

    def launch_together(self, jobs: Sequence[Job]) -> None:
        """One launch for jobs of one key, as large as the largest: kernels leave where a record has nothing
        to do."""
        grid = max(job.grid[0] for job in jobs), max(job.grid[1] for job in jobs)
        names = ", ".join(dict.fromkeys(job.name for job in jobs))
        records = [record for job in jobs for record in job.records]
        self.launch(jobs[0].kernel, jobs[0].block, grid, records, names)

    def over(
        self,
        kernel: str,
        place: Map,
        block: Block,
        record: Sequence[int],
        name: str,
        reads: Sequence[Area],
        writes: Sequence[Area] | None = None,
    ) -> None:
        """A kernel over the pixels and channels of a map, which it writes unless `writes` says otherwise."""
        writes = [self.area(place)] if writes is None else writes
        self.jobs.append(Job(kernel, block, self.grid(place, block), [record], name, reads, writes))

    def area(self, place: Map, taps: Sequence[Tap] = ()) -> Area:
        return map_area(place, self.images, taps)

    def grid(self, place: Map, block: Block) -> tuple[int, int]:
        pixels = self.images * place.height * place.width
        return -(-pixels // block["BLOCK_P"]), place.channels // block["BLOCK_C"]

    def lower_step(self, step: Step) -> None:
        """Launch what carries out a step."""
        raise NotImplementedError

    # ---- phases ----

    def phase(self, phase: Phase) -> None:
        for kind in ORDER:
            ops = [op for op in phase.barriers if type(op) is kind]
            for together in rounds(ops, written_by):
                self.barrier(kind, together)
        self.next = self.zeroed
        self.places = Places(self.take)
        for step in phase.steps:
            self.lower_step(step)
        for jobs in schedule(self.jobs):
            self.launch_together(jobs)
        self.jobs = []
        for entries in rounds(self.entries, _target):
            for is_sums in (True, False):
                self.add_up([entry for entry in entries if entry.is_sums == is_sums], is_sums)
        self.entries = []

    def add_up(self, entries: Sequence[Entry], is_sums: bool) -> None:
        if not entries:
            return
        block = add_up_block(is_sums)
        widest = max(entry.columns for entry in entries)
        start = 0 if is_sums else self.gradients
        records = [[*e.flags, e.partials, e.rows, e.width, e.columns, start + e.target] for e in entries]
        self.launch("add_up", block, (-(-widest // block["BLOCK"]), 1), records, "add up")

    def sums(self, flag: int, rows: int, width: int, targets: Sequence[tuple[int, int, int, int]]) -> int:
        """Work memory for `rows` rows of `width` partial sums, in doubles from its begin; targets: (another
        flag, column, columns, offset in the sums)."""
        at = self.take(2 * rows * width) // 2
        for other, column, columns, target in targets:
            self.entries.append(Entry((flag, other), at + column, rows, width, columns, target, True))
        return at

    def take(self, floats: int) -> int:
        """Work memory of this phase, for partial sums and what else it keeps."""
        at = self.next
        self.next += aligned(floats)
        self.top = max(self.top, self.next)
        return at

    def moments(self, step: Any, place: Map, block: Block) -> int:
        """Partial sums of a map and of another, for `step.moments`."""
        if step.moments == NONE:
            return NONE
        rows, width = self.grid(place, block)[0], 2 * place.channels
        return self.sums(step.flag, rows, width, [(NONE, 0, width, step.moments)])

    # ---- barrier operations ----

    def barrier(self, kind: type, ops: Sequence[Any]) -> None:
        records = [self.table.barrier(op) for op in ops]
        packs = kind in (PackDepthwise, UnpackDepthwise, PackDense, UnpackDense)
        block, size = dict(barrier_block(packs=packs)), 1
        if kind in (Coefficients, NormaliseBackward):
            size = max(-(-op.channels // block["BLOCK"]) for op in ops)
        elif packs:
            size = max(-(-_weights(op) // block["BLOCK"]) for op in ops)
            block["PACKS"] = kind in (PackDepthwise, PackDense)
        self.launch(_KERNELS[kind], block, (size, 1), records, kind.__name__)


def _weights(op: Any) -> int:
    """How many packed weights an operation has."""
    if isinstance(op, PackDense | UnpackDense):
        return op.count * op.in_channels * op.out_channels
    return op.count * op.channels


def _target(entry: Entry) -> list[tuple[bool, int]]:
    """What an entry adds to, lane by lane."""
    end = entry.target + entry.columns
    return [(entry.is_sums, at) for at in range(entry.target, end, SMALLEST)]


_KERNELS: dict[type, str] = {
    PackDepthwise: "pack_depthwise",
    PackDense: "pack_dense",
    UnpackDepthwise: "pack_depthwise",
    UnpackDense: "pack_dense",
    Normalise: "normalise",
    Coefficients: "coefficients",
    NormaliseBackward: "normalise_backward",
    DecisionGradient: "decision_gradient",
}
