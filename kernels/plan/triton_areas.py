"""Which memory a record of a launch reads and writes, and whether two such areas have a float in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd

from nascompile.kernels.plan.steps import NONE, Map, Space, Tap, Term


@dataclass(frozen=True, slots=True)
class Area:
    """The floats from `begin` to before `end` of one memory whose addresses, modulo `step`, are `first` to
    before first + count.

    So the channels of one part of a concatenation are told from those of the next. With `step` 0 all floats
    count. `memory`: "slab", "scratch" (of one image, for each has its own), "work" or the number of a tensor.
    """

    memory: str | int
    begin: int
    end: int
    step: int = 0
    first: int = 0
    count: int = 0

    def meets(self, other: Area) -> bool:
        """Whether a float may be in both."""
        if self.memory != other.memory or self.end <= other.begin or other.end <= self.begin:
            return False
        step = gcd(self.step, other.step) if self.step and other.step else 0
        if step <= max(self.count, other.count):
            return True
        away = (other.first - self.first) % step
        return away < self.count or step - away < other.count


def block_area(memory: str | int, begin: int, floats: int) -> Area:
    """Floats that lie one after another."""
    return Area(memory, begin, begin + floats)


def whole(tensor: int) -> Area:
    """All of a tensor."""
    return Area(tensor, 0, 1)


def weights_area(offset: int, taps: Sequence[Tap], size: int) -> list[Area]:
    """Packed weights of so many floats a tap, where there are any."""
    if offset == NONE or not taps:
        return []
    return [block_area("slab", offset, size * (1 + max(tap.weight for tap in taps)))]


def vectors(channels: int, *offsets: int) -> list[Area]:
    """Per-channel vectors of the slab, without those that are NONE."""
    return [block_area("slab", at, channels) for at in offsets if at != NONE]


def map_area(place: Map, images: int, taps: Iterable[Tap] = ()) -> Area:
    """The pixels of a map, or what so many taps read from there on."""
    offsets = [tap.offset for tap in taps] or [0]
    in_scratch = place.space == Space.scratch
    strides = (0 if in_scratch else place.image, place.row, place.pixel)
    counts = (images, place.height, place.width)
    begin = place.offset + min(offsets)
    last = sum((count - 1) * stride for count, stride in zip(counts, strides, strict=True))
    end = place.offset + max(offsets) + last + place.channels
    step = gcd(*(s for s, count in zip(strides, counts, strict=True) if count > 1), *offsets)
    first = place.offset % step if step else 0
    return Area("scratch" if in_scratch else "slab", begin, end, step, first, place.channels)


def sum_areas(terms: Sequence[Term], constant: int, images: int, channels: int) -> list[Area]:
    """What a sum of terms and a constant reads."""
    maps = [map_area(term.map, images) for term in terms]
    return [*maps, *vectors(channels, constant, *(term.coefficient for term in terms))]
