"""Where the channels of an image lie in its map: in whole vectors, with gaps where concatenated parts end
inside one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Segments = tuple[tuple[int, int, int], ...]
"""(first channel, how many, first padded channel), in order; those without a gap between them are one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`segments` of the channels, `padded`: how many there are with all gaps, a multiple of the lane."""

    segments: Segments
    padded: int

    def places(self) -> list[int]:
        """The padded channel of every channel."""
        return [padded + k for _, count, padded in self.segments for k in range(count)]

    def shifted(self, first: int) -> Segments:
        """The segments of an image whose channels begin at `first` of something larger."""
        return tuple((first + logical, count, padded) for logical, count, padded in self.segments)


def side_by_side(channels: int, lane: int) -> Layout:
    """Channels without gaps, padded to whole vectors."""
    return Layout(((0, channels, 0),), -(-channels // lane) * lane)


def joined(parts: Sequence[Layout]) -> Layout:
    """The layout of a concatenation: the parts' maps beside one another."""
    segments: list[tuple[int, int, int]] = []
    logical = start = 0
    for part in parts:
        for _, count, padded in part.segments:
            if segments and segments[-1][2] + segments[-1][1] == start + padded:
                first, before, at = segments.pop()
                segments.append((first, before + count, at))
            else:
                segments.append((logical, count, start + padded))
            logical += count
        start += part.padded
    return Layout(tuple(segments), start)


def starts(parts: Sequence[Layout]) -> list[int]:
    """The padded channels at which the parts of a concatenation begin."""
    return [sum(part.padded for part in parts[:index]) for index in range(len(parts))]


def runs(source: Layout, target: Layout, first: int, step: int) -> Iterator[tuple[int, int, int, int]]:
    """How channels first, first + step, ... of `source` come to `target`, in runs of equal steps.

    Each is (first source, step, first target, count), in padded channels.
    """
    to = target.places()
    chosen = source.places()[first::step][: len(to)]
    begin = 0
    for end in range(1, len(to) + 1):
        is_run = end < len(to) and to[end] == to[end - 1] + 1 and chosen[end] == chosen[end - 1] + step
        if not is_run:
            yield chosen[begin], step, to[begin], end - begin
            begin = end
