"""The parts a drawing is made of: boxes, links and panels; and the points where several links meet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Arrival = tuple[str, int | None]
"""A choice, and which of its inputs; None where it has only one."""


@dataclass(slots=True)
class Line:
    """One line of a box; `chosen` is None without an architecture."""

    text: str
    chosen: bool | None = None


@dataclass(slots=True)
class Box:
    """`kind` is "layer", "inputs", "group", "end" or "join"; `alive` is None without an architecture."""

    kind: str
    title: str = ""
    lines: list[Line] = field(default_factory=list)
    alive: bool | None = None
    shade: int = 0


@dataclass(slots=True)
class Link:
    """`alive` is None without an architecture."""

    source: str
    target: str
    alive: bool | None = None
    nested: bool = False


@dataclass(slots=True)
class Panel:
    """One connected picture; boxes in the order of the run."""

    title: str
    boxes: dict[str, Box]
    links: list[Link]


@dataclass(slots=True)
class Diagram:
    """Panels from top to bottom, and the candidate lists that boxes refer to by letter."""

    panels: list[Panel]
    legend: dict[str, tuple[str, ...]]


def joined(
    title: str,
    boxes: dict[str, Box],
    links: list[Link],
    bundles: Mapping[Arrival, frozenset[str]],
    alive: Callable[[frozenset[str], Arrival], bool | None],
) -> Panel:
    """A panel in which what several boxes receive together meets in one point: n x m links become n + m."""
    receivers: dict[frozenset[str], list[Arrival]] = defaultdict(list)
    inputs_of: dict[str, set[int | None]] = defaultdict(set)
    for end, sources in bundles.items():
        receivers[sources].append(end)
        inputs_of[end[0]].add(end[1])
    by_ends = {(link.source, link.target): link for link in links}
    replaced: set[tuple[str, str]] = set()
    kept: set[tuple[str, str]] = set()
    added: dict[tuple[str, str], Link] = {}
    points: dict[str, Box] = {}
    for number, (sources, ends) in enumerate(receivers.items()):
        separate = any(len(inputs_of[target]) > 1 for target, _ in ends)
        if len(sources) < 2 or (len(ends) < 2 and not separate) or any(t not in boxes for t, _ in ends):
            kept |= {(source, target) for source in sources for target, _ in ends}
            continue
        point = f"+{number}"
        replaced |= {(source, target) for source in sources for target, _ in ends}
        for end in ends:
            known = added.setdefault((point, end[0]), Link(point, end[0], alive(sources, end)))
            known.alive = either([known.alive, alive(sources, end)])
        lives = either(added[point, target].alive for target, _ in ends)
        for source in sources:
            into = either(by_ends[source, t].alive for t, _ in ends if (source, t) in by_ends)
            added[source, point] = Link(source, point, into and lives)
        points[point] = Box("join", alive=lives)
    rest = [link for ends, link in by_ends.items() if ends not in replaced or ends in kept]
    return Panel(title, _with_points(boxes, points, added), [*rest, *added.values()])


def either(values: Iterable[bool | None]) -> bool | None:
    """Whether any is true; None when all are None, that is without an architecture."""
    known = list(values)
    return None if all(value is None for value in known) else any(known)


def _with_points(
    boxes: Mapping[str, Box], points: Mapping[str, Box], added: Mapping[tuple[str, str], Link]
) -> dict[str, Box]:
    # a point comes after the last of its sources
    position = {name: index for index, name in enumerate(boxes)}
    place = {point: max(position[s] for s, t in added if t == point) + 0.5 for point in points}
    everything = {**boxes, **points}
    return dict(sorted(everything.items(), key=lambda item: position.get(item[0], place.get(item[0], 0.0))))
