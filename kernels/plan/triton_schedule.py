"""Which records of a phase one launch carries out together: those of one kernel that do not wait for one
another."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from nascompile.kernels.plan.triton_areas import Area
from nascompile.kernels.plan.triton_blocks import Block


@dataclass(eq=False, slots=True)
class Job:
    """Records that are carried out at once, in a grid of `grid` programs each; what they read and write.

    What several add to is written by all of them: they take turns in the program's order.
    """

    kernel: str
    block: Block
    grid: tuple[int, int]
    records: Sequence[Sequence[int]]
    name: str
    reads: Sequence[Area]
    writes: Sequence[Area]

    @property
    def key(self) -> Hashable:
        """Equal for those that one launch may carry out."""
        return self.kernel, tuple(self.block.items())


def schedule(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups for one launch each, every one after those that it depends on."""
    before = dependencies(jobs)
    after: list[list[int]] = [[] for _ in jobs]
    for number, others in enumerate(before):
        for other in others:
            after[other].append(number)
    # how long the chains are that wait for a job
    chains = [0] * len(jobs)
    for number in reversed(range(len(jobs))):
        chains[number] = max((1 + chains[follower] for follower in after[number]), default=0)
    waits = [len(others) for others in before]
    ready: dict[Hashable, list[int]] = {}
    for number, count in enumerate(waits):
        if not count:
            ready.setdefault(jobs[number].key, []).append(number)

    def longest(key: Hashable) -> int:
        return max(chains[number] for number in ready[key])

    found = []
    while ready:
        # the longest chain decides how many launches there are; the others' ends may meet more of their kind
        group = ready.pop(max(ready, key=longest))
        found.append([jobs[number] for number in group])
        for follower in (follower for number in group for follower in after[number]):
            waits[follower] -= 1
            if not waits[follower]:
                ready.setdefault(jobs[follower].key, []).append(follower)
    return found


def dependencies(jobs: Sequence[Job]) -> list[set[int]]:
    """For each job the earlier ones that have to be done before it; not all that others of these wait for."""
    areas: dict[Area, int] = {}
    for job in jobs:
        for area in (*job.reads, *job.writes):
            areas.setdefault(area, len(areas))
    meeting = _meeting(list(areas))
    writer: dict[int, int] = {}
    readers: list[list[int]] = [[] for _ in areas]
    found: list[set[int]] = []
    for number, job in enumerate(jobs):
        before: set[int] = set()
        for area in job.reads:
            before.update(writer[other] for other in meeting[areas[area]] if other in writer)
        for area in job.writes:
            for other in meeting[areas[area]]:
                before.update(readers[other])
                if other in writer:
                    before.add(writer[other])
        for area in job.reads:
            readers[areas[area]].append(number)
        for area in job.writes:
            writer[areas[area]], readers[areas[area]] = number, []
        before.discard(number)
        found.append(before)
    return found


def _meeting(areas: Sequence[Area]) -> list[list[int]]:
    """For each area those it meets, itself among them."""
    found: list[list[int]] = [[number] for number in range(len(areas))]
    open_: dict[str | int, list[int]] = {}
    for number in sorted(range(len(areas)), key=lambda number: areas[number].begin):
        area = areas[number]
        others = [o for o in open_.get(area.memory, ()) if areas[o].end > area.begin]
        for other in others:
            if area.meets(areas[other]):
                found[number].append(other)
                found[other].append(number)
        open_[area.memory] = [*others, number]
    return found
