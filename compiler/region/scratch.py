"""Scratch memory of a plan: which user of an image gets which."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from nascompile.compiler.region.tasks import scratch_map
from nascompile.kernels.plan.program import aligned
from nascompile.kernels.plan.steps import Map

COPIES = 1 << 28
"""Bytes that further images of one geometry may take on a GPU."""


class Scratch:
    """Scratch images, by name and geometry. There is one of each, whose users take turns.

    On a GPU, where users that wait for one another cannot share a launch, every user of a phase has one of
    its own while there is room; then they take turns too. An image's border is zero from the begin of a run
    on, for all its users write the interior only.
    """

    def __init__(self, in_turn: bool, images: int) -> None:
        self.floats = 0
        # a thread of the CPU takes one step after another, and fewer images keep its cache small
        self.has_copies = not in_turn
        self._room = 0 if in_turn else COPIES // (4 * images)
        self._maps: defaultdict[tuple[Any, ...], list[Map]] = defaultdict(list)
        self._users: Counter[tuple[Any, ...]] = Counter()

    def begin_phase(self) -> None:
        """All images are free again."""
        self._users.clear()

    def get(self, name: str, channels: int, height: int, width: int, border: tuple[int, int]) -> Map:
        """The interior of an image with zeros around it."""
        key = (name, channels, height, width, border)
        maps, user = self._maps[key], self._users[key]
        self._users[key] += 1
        if user >= len(maps):
            self._add(maps, channels, height, width, border)
        return maps[user % len(maps)]

    def several(self, count: int, name: str, channels: int, height: int, width: int) -> list[Map]:
        """Different images without a border: as many as asked for, or fewer, at least one."""
        found = [self.get(name, channels, height, width, (0, 0)) for _ in range(count)]
        return list(dict.fromkeys(found))

    def _add(self, maps: list[Map], channels: int, height: int, width: int, border: tuple[int, int]) -> None:
        """Another image of a geometry: the first in any case, and others where there is room."""
        row = (width + 2 * border[1]) * channels
        # rows a whole number of kilobytes apart would fall on the same cache lines
        if row % 256 == 0 and any(border):
            row += channels
        # one row more: the taps of the last pixel may pass the end of the last border
        size = aligned((height + 2 * border[0] + 1) * row)
        if maps and size > self._room:
            return
        self._room -= size if maps else 0
        start = self.floats + border[0] * row + border[1] * channels
        maps.append(scratch_map(start, row, channels, channels, height, width))
        self.floats += size
