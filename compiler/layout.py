"""Places the boxes of a drawing in layers, so that links point one way, cross little and go around boxes.

The scheme of Sugiyama, Tagawa and Toda (1981): layers, one point a layer for long links, orders by
barycentres; then coordinates that bring each box to the middle of its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import networkx as nx

Point = tuple[float, float]
Node = Any
"""A name of a box, or a waypoint."""

SWEEPS = 12
"""Rounds of ordering and of straightening; drawings no longer change after about eight."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Centres of the boxes, and the points each link passes, centre to centre; `size` is width and height.

    The first layer is on the left, or at the top with `downwards`; y points up.
    """

    centres: dict[Node, Point]
    routes: dict[tuple[Node, Node], list[Point]]
    size: Point


def place(
    sizes: Mapping[Node, Point],
    links: Sequence[tuple[Node, Node]],
    *,
    gap: Point = (0.5, 0.16),
    downwards: bool = False,
) -> Placement:
    """Lay out boxes of the given widths and heights; of links that close a cycle, the later end is the
    source.

    `sizes` is in the order in which boxes should appear; a link against that order is routed backwards. `gap`
    is the distance between layers, and between neighbours in a layer.
    """
    position = {name: index for index, name in enumerate(sizes)}
    forward = [(a, b) if position[a] < position[b] else (b, a) for a, b in links if a != b]
    graph = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(forward)
    layers = _layers(graph)
    thickness = {name: _oriented(size, downwards) for name, size in sizes.items()}
    chains, columns = _with_waypoints(graph, layers)
    for chain in chains.values():
        thickness |= dict.fromkeys(chain[1:-1], (0.0, 0.0))
    neighbours = _neighbours(chains)
    _order(columns, neighbours)
    across = _straighten(columns, neighbours, {n: t[1] for n, t in thickness.items()}, gap[1])
    along, depth = _along(columns, {n: t[0] for n, t in thickness.items()}, gap[0])
    return _finish(sizes, thickness, chains, along, depth, across, links, downwards)


def _oriented(size: Point, downwards: bool) -> Point:
    return (size[1], size[0]) if downwards else size


def _layers(graph: nx.DiGraph) -> dict[Node, int]:
    early: dict[Node, int] = {}
    for node in nx.topological_sort(graph):
        early[node] = max((early[p] + 1 for p in graph.predecessors(node)), default=0)
    late: dict[Node, int] = {}
    for node in reversed(list(nx.topological_sort(graph))):
        # where a link begins nothing is before it: what has no source itself stays in front
        follower = min((late[s] - 1 for s in graph.successors(node)), default=early[node])
        late[node] = follower if graph.in_degree(node) else early[node]
    return min((early, late), key=_largest_layer)


def _largest_layer(layers: dict[Node, int]) -> int:
    counts: dict[int, int] = defaultdict(int)
    for layer in layers.values():
        counts[layer] += 1
    return max(counts.values(), default=0)


def _with_waypoints(
    graph: nx.DiGraph, layers: dict[Node, int]
) -> tuple[dict[tuple[Node, Node], list[Node]], list[list[Node]]]:
    columns: list[list[Node]] = [[] for _ in range(max(layers.values(), default=0) + 1)]
    for node in graph:
        columns[layers[node]].append(node)
    chains: dict[tuple[Node, Node], list[Node]] = {}
    for source, target in graph.edges:
        between = [("via", source, target, layer) for layer in range(layers[source] + 1, layers[target])]
        chains[source, target] = [source, *between, target]
        for point in between:
            columns[point[3]].append(point)
    return chains, columns


def _neighbours(chains: Mapping[tuple[Node, Node], list[Node]]) -> tuple[dict, dict]:
    before: dict[Node, list[Node]] = defaultdict(list)
    after: dict[Node, list[Node]] = defaultdict(list)
    for chain in chains.values():
        for left, right in pairwise(chain):
            after[left].append(right)
            before[right].append(left)
    return before, after


def _order(columns: list[list[Node]], neighbours: tuple[dict, dict]) -> None:
    before, after = neighbours
    best, fewest = [list(column) for column in columns], _crossings(columns, after)
    for sweep in range(SWEEPS):
        todo = columns if sweep % 2 == 0 else list(reversed(columns))
        side = before if sweep % 2 == 0 else after
        for fixed, column in pairwise(todo):
            rank = {node: index for index, node in enumerate(fixed)}
            own = {node: index for index, node in enumerate(column)}
            column.sort(key=lambda n: (fmean(map(rank.__getitem__, side[n])) if side[n] else own[n], own[n]))
        crossings = _crossings(columns, after)
        if crossings < fewest:
            best, fewest = [list(column) for column in columns], crossings
    columns[:] = best


def _crossings(columns: list[list[Node]], after: dict[Node, list[Node]]) -> int:
    total = 0
    for left, right in pairwise(columns):
        rank = {node: index for index, node in enumerate(right)}
        seen: list[int] = []
        for node in left:
            targets = [rank[target] for target in after[node]]
            total += sum(1 for t in targets for other in seen if other > t)
            seen += targets
    return total


def _straighten(
    columns: list[list[Node]], neighbours: tuple[dict, dict], extent: Mapping[Node, float], gap: float
) -> dict[Node, float]:
    across: dict[Node, float] = {}
    for column in columns:
        total = sum(extent[node] + gap for node in column)
        cursor = -total / 2
        for node in column:
            across[node] = cursor + (extent[node] + gap) / 2
            cursor += extent[node] + gap
    before, after = neighbours
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            both = {node: before[node] + after[node] for node in column}
            side = both if sweep >= SWEEPS - 2 else (before if sweep % 2 == 0 else after)
            wanted = [fmean(across[n] for n in side[node]) if side[node] else across[node] for node in column]
            distances = [(extent[a] + extent[b]) / 2 + gap for a, b in pairwise(column)]
            for node, value in zip(column, _apart(wanted, distances), strict=True):
                across[node] = value
    return across


def _apart(wanted: list[float], distances: list[float]) -> list[float]:
    """The closest positions that keep order and distances: least squares by pooling adjacent violators."""
    offsets = [0.0]
    for distance in distances:
        offsets.append(offsets[-1] + distance)
    blocks: list[tuple[float, int]] = []
    for value, offset in zip(wanted, offsets, strict=True):
        mean, count = value - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]


def _along(
    columns: list[list[Node]], extent: Mapping[Node, float], gap: float
) -> tuple[dict[Node, float], dict[Node, float]]:
    """The middle of the layer of every node, and half the depth of that layer."""
    along: dict[Node, float] = {}
    depth: dict[Node, float] = {}
    cursor = 0.0
    for column in columns:
        width = max((extent[node] for node in column), default=0.0)
        along |= dict.fromkeys(column, cursor + width / 2)
        depth |= dict.fromkeys(column, width / 2)
        cursor += width + gap
    return along, depth


def _finish(
    sizes: Mapping[Node, Point],
    thickness: Mapping[Node, Point],
    chains: Mapping[tuple[Node, Node], list[Node]],
    along: Mapping[Node, float],
    depth: Mapping[Node, float],
    across: Mapping[Node, float],
    links: Sequence[tuple[Node, Node]],
    downwards: bool,
) -> Placement:
    low = min((across[n] - thickness[n][1] / 2 for n in across), default=0.0)
    high = max((across[n] + thickness[n][1] / 2 for n in across), default=0.0)
    length = max((along[n] + thickness[n][0] / 2 for n in along), default=0.0)

    def point(node: Node, shift: float = 0.0) -> Point:
        if downwards:
            return across[node] - low, length - (along[node] + shift)
        return along[node] + shift, high - across[node]

    def route(chain: Sequence[Node]) -> list[Point]:
        # straight through its layers, so that it bends only between them, where no box is
        points = [point(chain[0]), point(chain[0], depth[chain[0]])]
        for node in chain[1:-1]:
            points += [point(node, -depth[node]), point(node, depth[node])]
        return [*points, point(chain[-1], -depth[chain[-1]]), point(chain[-1])]

    routes = {}
    for source, target in links:
        if (source, target) in chains:
            routes[source, target] = route(chains[source, target])
        elif source != target:
            routes[source, target] = route(chains[target, source])[::-1]
    size = (high - low, length) if downwards else (length, high - low)
    return Placement({node: point(node) for node in sizes}, routes, size)
