"""Tasks: the steps and barrier operations of a plan before they have an order, and how they get one.

A task says what it reads and writes. Two steps on one image may share a phase in their order; what is summed
over the batch is there one phase later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nascompile.compiler.region.flags import ALWAYS
from nascompile.compiler.region.ir import Value
from nascompile.compiler.region.memory import Buffer, Place
from nascompile.kernels.plan.steps import Activation, Map, Space

PACK, UNPACK = "pack", "unpack"
"""The names of the tasks that pack weights, and of those that unpack their gradients."""


@dataclass(frozen=True, slots=True)
class Staged:
    """An image that convolutions read: activation(scale * source + shift), surrounded by zeros.

    `scale` is the buffer of a normalisation's vectors, or None. Where nothing needs to be done to the source
    it is read where it lies (`is_direct`).
    """

    source: Place
    vectors: Buffer | None
    activation: Activation
    border: tuple[int, int]

    @property
    def is_direct(self) -> bool:
        """Whether the source itself is read."""
        plain = self.vectors is None and self.activation == Activation.none
        return plain and self.border == (0, 0)


@dataclass(frozen=True, slots=True)
class Gather:
    """Where the gradient of a staged image goes: added or written to `target`; `moments` as in Unstage."""

    target: Place
    adds: bool
    moments: int


@dataclass(eq=False, slots=True)
class Task:
    """`make` gives the operation once memory is laid out, from the scratch maps it asked for (by name); or
    several of which the flags choose one.

    `staged`: the image it reads, scratch map "x"; `gather`: where the gradient of that image goes, scratch
    map "dx". scratch: further maps, (name, channels, height, width, border). `name`, `value` (what it, or its
    gradient, belongs to) and `work` (FLOPs for one image) are for people.
    """

    name: str
    value: Value
    make: Callable[[dict[str, Map]], Any]
    is_barrier: bool
    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    flag: int
    staged: Staged | None = None
    gather: Gather | None = None
    scratch: tuple[tuple[str, int, int, int, tuple[int, int]], ...] = ()
    work: int = 0
    phase: int = -1


@dataclass(eq=False, slots=True)
class TaskList:
    """Tasks in an order in which they could run one by one."""

    tasks: list[Task] = field(default_factory=list)

    def step(
        self,
        name: str,
        value: Value,
        make: Any,
        *,
        reads: Sequence[Hashable] = (),
        writes: Sequence[Hashable] = (),
        flag: int = ALWAYS,
        **more: Any,
    ) -> None:
        """Add a step; `more`: further fields of its task."""
        self.tasks.append(Task(name, value, make, False, tuple(reads), tuple(writes), flag, **more))

    def barrier(
        self,
        name: str,
        value: Value,
        make: Callable[[], Any],
        reads: Sequence[Hashable],
        writes: Sequence[Hashable],
        flag: int,
    ) -> None:
        """Add a barrier operation."""
        self.tasks.append(Task(name, value, lambda _: make(), True, tuple(reads), tuple(writes), flag))

    def dependencies(self) -> list[tuple[int, int]]:
        """(earlier, later) for all pairs that matter."""
        writers: dict[Hashable, list[int]] = {}
        readers: defaultdict[Hashable, list[int]] = defaultdict(list)
        found = []
        for number, task in enumerate(self.tasks):
            for what in task.reads:
                found += [(writer, number) for writer in writers.get(what, ())]
                readers[what].append(number)
            for what in task.writes:
                if isinstance(what, Summed):
                    # additions in any order; the sum is read later
                    writers.setdefault(what, []).append(number)
                    continue
                found += [(before, number) for before in (*writers.get(what, ()), *readers[what])]
                writers[what], readers[what] = [number], []
        return [(before, after) for before, after in found if before != after]


@dataclass(frozen=True, slots=True)
class Summed:
    """Something chunks add to: sums (fp64), by their offset, or the gradients (fp32) of a weight."""

    what: int | Buffer


def set_phases(tasks: TaskList, *, late: bool) -> int:
    """Give every task its phase: as early as possible, or as late. Returns the number of phases.

    Forward runs early, backward late: both bring together what reads one source.
    """
    seen: dict[Hashable, _Seen] = {}
    for task in reversed(tasks.tasks) if late else tasks.tasks:
        phase = 0
        for what in task.reads:
            if what in seen and not (late and isinstance(what, Summed)):
                phase = max(phase, seen[what].after_writers(task, late))
        for what in task.writes:
            if what in seen and (late or not isinstance(what, Summed)):
                phase = max(phase, seen[what].after_readers(task, late))
                if not isinstance(what, Summed):
                    phase = max(phase, seen[what].after_writers(task, late))
        task.phase = phase
        for what in task.reads:
            seen.setdefault(what, _Seen()).note(task, is_write=False)
        for what in task.writes:
            seen.setdefault(what, _Seen()).note(task, is_write=True)
    last = max((task.phase for task in tasks.tasks), default=-1)
    if late:
        for task in tasks.tasks:
            task.phase = last - task.phase
    return last + 1


def pack_when_used(tasks: Sequence[Task]) -> None:
    """Move the tasks that pack weights to the phases in which these are first read: until then they need no
    memory, and then they lie in a cache."""
    first: dict[Hashable, int] = {}
    for task in tasks:
        for what in task.reads:
            first[what] = min(first.get(what, task.phase), task.phase)
    for task in tasks:
        if task.name == PACK:
            task.phase = min((first[what] for what in task.writes if what in first), default=task.phase)


def pack_at_once(tasks: Sequence[Task]) -> None:
    """Move the tasks that pack weights to the first phase."""
    for task in tasks:
        task.phase = 0 if task.name == PACK else task.phase


def unpack_when_complete(tasks: Sequence[Task]) -> None:
    """Move the tasks that unpack gradients to the phases after those in which these are added up."""
    last: dict[Hashable, int] = {}
    for task in tasks:
        for what in task.writes:
            last[what] = max(last.get(what, 0), task.phase)
    for task in tasks:
        if task.name == UNPACK:
            task.phase = 1 + max(last[what] for what in task.reads)


class _Seen:
    """The last phases (counted from where the scan began) of the tasks that wrote or read one thing."""

    __slots__ = ("_read", "_written")

    def __init__(self) -> None:
        # of steps, of barrier operations
        self._written = [-1, -1]
        self._read = [-1, -1]

    def note(self, task: Task, *, is_write: bool) -> None:
        phases = self._written if is_write else self._read
        phases[task.is_barrier] = max(phases[task.is_barrier], task.phase)

    def after_writers(self, task: Task, late: bool) -> int:
        return _after(self._written, task, late)

    def after_readers(self, task: Task, late: bool) -> int:
        return _after(self._read, task, late)


def _after(phases: list[int], task: Task, late: bool) -> int:
    """The first phase for a task next to others, steps and barrier operations."""
    step, barrier = phases
    if late:
        # the others run later: a barrier operation after a step needs a phase of its own
        gap = int(not task.is_barrier)
        return max(step, barrier + gap if barrier >= 0 else -1)
    return max(step + int(task.is_barrier) if step >= 0 else -1, barrier)


def in_phase(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """The barrier operations and the steps of a phase, ordered; steps on one staged image stand together."""
    barriers = [task for task in tasks if task.is_barrier]
    steps = [task for task in tasks if not task.is_barrier]
    waits = {id(task): 0 for task in steps}
    followers: defaultdict[int, list[Task]] = defaultdict(list)
    listed = TaskList(steps)
    for before, after in listed.dependencies():
        followers[id(steps[before])].append(steps[after])
        waits[id(steps[after])] += 1
    ready = [task for task in steps if not waits[id(task)]]
    ordered: list[Task] = []
    last: Staged | None = None
    while ready:
        index = next((i for i, t in enumerate(ready) if t.staged is not None and t.staged == last), 0)
        task = ready.pop(index)
        last = task.staged
        ordered.append(task)
        for follower in followers[id(task)]:
            waits[id(follower)] -= 1
            if not waits[id(follower)]:
                ready.append(follower)
    assert len(ordered) == len(steps)
    return barriers, ordered


def touch(tasks: Sequence[Task], shift: int) -> None:
    """Record in the buffers when they are used; `shift` is the number of phases before these tasks."""
    for task in tasks:
        for what in (*task.reads, *task.writes):
            buffer = what.what if isinstance(what, Summed) else what[0] if isinstance(what, tuple) else what
            if isinstance(buffer, Buffer):
                buffer.first = min(buffer.first, task.phase + shift)
                buffer.last = max(buffer.last, task.phase + shift)


def scratch_map(offset: int, row: int, pixel: int, channels: int, height: int, width: int) -> Map:
    """A map in scratch."""
    return Map(Space.scratch, offset, 0, row, pixel, channels, height, width)
