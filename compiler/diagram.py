"""What a drawing of a search space shows: boxes and links in panels, before anything is placed or painted.

Large spaces repeat themselves: choices below the same numbered container (`cells.3`) become one box of an
overview, and every distinct inside is shown once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx

from nascompile.compiler.decision import read_mask
from nascompile.compiler.graph import INPUT, OUTPUT
from nascompile.compiler.panels import Arrival, Box, Diagram, Line, Link, Panel, either, joined

FLAT_LIMIT = 30
"""More choices than this are grouped."""

DENSE = 2.5
"""An overview with more links a box than this leaves out those that others imply."""

LISTED = 9
"""A box lists at most so many candidates."""


def diagram(graph: nx.DiGraph, masks: Mapping[str, Sequence[Any]] | None = None) -> Diagram:
    """The diagram of a choice graph; `masks`, a mask a key, mark what an architecture chose."""
    view = _View(graph, masks)
    paths = view.order
    groups = _groups(paths) if len(paths) > FLAT_LIMIT else {}
    if not groups:
        return Diagram([view.flat(paths)], view.legend)
    return Diagram([view.overview(groups), *view.insides(groups)], view.legend)


def _groups(paths: Sequence[str]) -> dict[str, list[str]]:
    """Choices by the first numbered container above them; empty where that makes the drawing no smaller."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        parts = path.split(".")
        numbered = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if numbered is not None:
            found[".".join(parts[: numbered + 1])].append(path)
    groups = {name: members for name, members in found.items() if len(members) > 1}
    return groups if sum(map(len, groups.values())) >= 2 * len(groups) and len(groups) > 1 else {}


class _View:
    """A choice graph and an architecture, as boxes and links."""

    def __init__(self, graph: nx.DiGraph, masks: Mapping[str, Sequence[Any]] | None) -> None:
        self.graph = graph
        self.order = _order(graph)
        self.chosen = {path: self._indices(path, masks) for path in self.order}
        self.decided = masks is not None
        self.alive = self._alive()
        self.legend: dict[str, tuple[str, ...]] = {}
        self.letters = self._letters()

    def _indices(self, path: str, masks: Mapping[str, Sequence[Any]] | None) -> tuple[int, ...] | None:
        node = self.graph.nodes[path]
        return (
            None
            if masks is None
            else read_mask(masks[node["key"]], len(node["candidates"]), node["key"]).indices
        )

    def _alive(self) -> set[str]:
        """What the output needs under the architecture; everything without one."""
        if not self.decided:
            return set(self.graph)
        used = nx.DiGraph()
        used.add_nodes_from(self.graph)
        used.add_edges_from(edge for edge in self.graph.edges if self._carries(*edge))
        return {OUTPUT, *nx.ancestors(used, OUTPUT)}

    def _carries(self, source: str, target: str) -> bool:
        """Whether the architecture lets the values of a link through."""
        if not self.decided:
            return True
        inside = self.graph.nodes[source].get("inside")
        if inside is not None and not self._runs(inside):
            return False
        chosen = self.chosen.get(target)
        through = self.graph.edges[source, target]["candidates"]
        return not through or chosen is None or bool(set(through) & set(chosen))

    def _runs(self, inside: tuple[str, str]) -> bool:
        path, name = inside
        names = [candidate["name"] for candidate in self.graph.nodes[path]["candidates"]]
        outer = self.graph.nodes[path]["inside"]
        return names.index(name) in (self.chosen[path] or ()) and (outer is None or self._runs(outer))

    def _letters(self) -> dict[tuple[str, ...], str]:
        """A letter for every list of layers that more than three choices share."""
        counts: dict[tuple[str, ...], int] = defaultdict(int)
        for path in self.order:
            if self.graph.nodes[path]["kind"] == "LayerChoice":
                counts[self._names(path)] += 1
        repeated = [names for names, count in counts.items() if count > 3 and len(names) > 2]
        letters = {names: chr(ord("A") + index) for index, names in enumerate(repeated[:26])}
        self.legend = {letter: names for names, letter in letters.items()}
        return letters

    def _names(self, path: str) -> tuple[str, ...]:
        """Of the candidates; a bare number is followed by the class of the layer."""
        found = []
        for candidate in self.graph.nodes[path]["candidates"]:
            plain = candidate["name"].isdigit() and candidate["type"] is not None
            found.append(f"{candidate['name']} {candidate['type']}" if plain else candidate["name"])
        return tuple(found)

    # boxes

    def box(self, path: str, prefix: str = "") -> Box:
        """The box of one choice, or of the input or output."""
        if path in (INPUT, OUTPUT):
            return Box("end", path.strip("()"), alive=(path in self.alive) if self.decided else None)
        node = self.graph.nodes[path]
        kind = "layer" if node["kind"] == "LayerChoice" else "inputs"
        alive = (path in self.alive) if self.decided else None
        return Box(kind, _title(path, node, prefix), self._lines(path), alive)

    def _lines(self, path: str) -> list[Line]:
        names, chosen = self._names(path), self.chosen[path]
        node = self.graph.nodes[path]
        layer = node["kind"] == "LayerChoice"
        if not layer:
            count = "any" if node["n_chosen"] is None else str(node["n_chosen"])
            heading = [Line(f"{count} of {len(names)} inputs")]
            labels = [name if not name.isdigit() else f"input {name}" for name in names]
        else:
            letter = self.letters.get(names)
            heading = [Line(f"1 of {len(names)} ({letter})" if letter else f"1 of {len(names)}")]
            labels = list(names)
        if chosen is not None and (not layer or names in self.letters or len(names) > LISTED):
            picked = [Line(labels[index], True) for index in chosen] or [Line("nothing", True)]
            return [*heading, *picked]
        if not layer or names in self.letters:
            return heading
        marked = [Line(label, None if chosen is None else i in chosen) for i, label in enumerate(labels)]
        hidden = len(marked) - LISTED
        return marked if hidden <= 0 else [*marked[:LISTED], Line(f"and {hidden} more")]

    # panels

    def flat(self, paths: Iterable[str]) -> Panel:
        """Everything in one panel."""
        boxes = {INPUT: self.box(INPUT), **{path: self.box(path) for path in paths}, OUTPUT: self.box(OUTPUT)}
        links = [self._link(source, target) for source, target in self.graph.edges]
        return joined("", boxes, links, self._bundles(self.graph.edges), self._arrives)

    def overview(self, groups: Mapping[str, Sequence[str]]) -> Panel:
        """The groups as boxes."""
        home: dict[str, str] = {path: name for name, members in groups.items() for path in members}
        boxes = {INPUT: self.box(INPUT)}
        shades = self._classes(groups)
        for path in self.order:
            name = home.get(path)
            if name is None:
                boxes[path] = self.box(path)
            elif name not in boxes:
                lines = [Line(f"{len(groups[name])} choices")]
                boxes[name] = Box("group", name, lines, self._any_alive(groups[name]), shades[name])
        boxes[OUTPUT] = self.box(OUTPUT)
        links: dict[tuple[str, str], Link] = {}
        for source, target in self.graph.edges:
            ends: tuple[str, str] = home.get(source) or source, home.get(target) or target
            if ends[0] != ends[1]:
                link = self._link(source, target)
                known = links.setdefault(ends, Link(*ends, alive=link.alive))
                known.alive = either([known.alive, link.alive])
        title = "overview"
        if len(links) > DENSE * len(boxes):
            title = "overview, without links that others imply"
            links = _reduced(boxes, links)
        return joined(title, boxes, list(links.values()), {}, self._arrives)

    def insides(self, groups: Mapping[str, Sequence[str]]) -> list[Panel]:
        """One panel for every distinct inside."""
        shades = self._classes(groups)
        by_shade: dict[int, list[str]] = defaultdict(list)
        for name in groups:
            by_shade[shades[name]].append(name)
        return [self._inside(names, groups) for names in by_shade.values()]

    def _inside(self, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Panel:
        home: dict[str, str] = {path: name for name, members in groups.items() for path in members}

        # the first cells of a network may have fewer inputs than the others
        shown = max(names, key=lambda name: len(self._arrivals(name, home)))
        arrivals = self._arrivals(shown, home)
        boxes: dict[str, Box] = {}
        links: dict[tuple[str, str], Link] = {}

        def connect(start: str, link: Link, end: str) -> None:
            known = links.setdefault((start, end), Link(start, end, link.alive, link.nested))
            known.alive = either([known.alive, link.alive])

        for number, (sources, ends) in enumerate(arrivals.items()):
            boxes[f"<{number}"] = Box("end", f"from {_ranges(self._homes(sources, home))}")
            for end in ends:
                connect(f"<{number}", Link("", "", self._arrives(sources, end)), end[0])
        boxes |= {path: self.box(path, shown) for path in groups[shown]}
        bundled: list[tuple[str, str]] = []
        for source, target in self.graph.edges:
            if home.get(source) == shown:
                inner = home.get(target) == shown
                connect(source, self._link(source, target), target if inner else ">")
                bundled += [(source, target)] if inner else []
        boxes[">"] = Box("end", "out")
        title = (
            shown
            if len(names) == 1
            else f"{shown}, and the same in {_ranges(n for n in names if n != shown)}"
        )
        return joined(title, boxes, list(links.values()), self._bundles(bundled), self._arrives)

    def _arrives(self, sources: frozenset[str], end: Arrival) -> bool | None:
        """Whether the architecture uses what arrives there together."""
        if not self.decided:
            return None
        target, candidate = end
        chosen = self.chosen.get(target)
        through = candidate is None or chosen is None or candidate in chosen
        return through and target in self.alive and not self.alive.isdisjoint(sources)

    def _arrivals(self, name: str, home: Mapping[str, str]) -> dict[frozenset[str], list[Arrival]]:
        """What comes into a group together, and where it goes."""
        found: dict[frozenset[str], list[Arrival]] = defaultdict(list)
        into = [(s, t) for s, t in self.graph.edges if home.get(t) == name]
        for end, sources in self._bundles(into).items():
            outside = frozenset(source for source in sources if home.get(source) != name)
            if outside:
                found[outside].append(end)
        return found

    def _homes(self, paths: Iterable[str], home: Mapping[str, str]) -> list[str]:
        rank = {INPUT: -1, **{path: i for i, path in enumerate(self.order)}}
        names = (home.get(path, path.strip("()")) for path in sorted(paths, key=rank.__getitem__))
        return list(dict.fromkeys(names))

    def _any_alive(self, paths: Iterable[str]) -> bool | None:
        return any(path in self.alive for path in paths) if self.decided else None

    def _classes(self, groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """A number for every distinct inside: the same choices, inner links and decisions."""
        known: dict[Any, int] = {}
        return {
            name: known.setdefault(self._signature(name, members), len(known))
            for name, members in groups.items()
        }

    def _signature(self, name: str, members: Sequence[str]) -> Any:
        short = {path: path[len(name) :] for path in members}
        nodes = []
        for path in sorted(members):
            node = self.graph.nodes[path]
            # a key of one's own is only a name; a shared one says which choices are decided together
            key = node["key"] if node["shared"] else None
            # the names of inputs are keys of other choices
            names = self._names(path) if node["kind"] == "LayerChoice" else len(self._names(path))
            nodes.append((short[path], key, names, node["n_chosen"], self.chosen[path]))
        inner = sorted((short[s], short[t]) for s, t in self.graph.edges if s in short and t in short)
        return tuple(nodes), tuple(inner)

    def _link(self, source: str, target: str) -> Link:
        alive = None
        if self.decided:
            alive = source in self.alive and target in self.alive and self._carries(source, target)
        inside = self.graph.nodes[source].get("inside")
        return Link(source, target, alive, nested=inside is not None and inside[0] == target)

    def _bundles(self, edges: Iterable[tuple[str, str]]) -> dict[Arrival, frozenset[str]]:
        """What arrives together (added up, concatenated) at a choice, or at one input of an InputChoice."""
        found: dict[Arrival, set[str]] = defaultdict(set)
        for source, target in edges:
            for candidate in self.graph.edges[source, target]["candidates"] or [None]:
                found[target, candidate].add(source)
        return {end: frozenset(sources) for end, sources in found.items()}


def _order(graph: nx.DiGraph) -> list[str]:
    paths = [node for node in graph if node not in (INPUT, OUTPUT)]
    last = len(paths)
    return sorted(
        paths, key=lambda path: last if graph.nodes[path]["order"] is None else graph.nodes[path]["order"]
    )


def _title(path: str, node: Mapping[str, Any], prefix: str) -> str:
    if not re.fullmatch(rf"{node['kind']}\d+", node["key"]):
        return node["key"]
    # a key that was given automatically says nothing
    return (path[len(prefix) :].lstrip(".") if prefix else path) or "(model)"


def _reduced(boxes: Mapping[str, Box], links: Mapping[tuple[str, str], Link]) -> dict[tuple[str, str], Link]:
    position = {name: index for index, name in enumerate(boxes)}
    graph = nx.DiGraph(ends for ends in links if position[ends[0]] < position[ends[1]])
    kept = set(nx.transitive_reduction(graph).edges)
    return {ends: link for ends, link in links.items() if ends in kept or ends not in graph.edges}


def _ranges(names: Iterable[str]) -> str:
    """`cells.1, cells.2, cells.3` as `cells.1-3`."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] + (f"-{run[-1].rpartition('.')[2]}" if len(run) > 1 else "") for run in runs)


def _follows(first: str, second: str) -> bool:
    (stem, _, number), (other, _, later) = first.rpartition("."), second.rpartition(".")
    return stem == other and number.isdigit() and later.isdigit() and int(later) == int(number) + 1
