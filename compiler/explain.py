"""Says in words and numbers what a search space holds and costs, and what of it was compiled or why not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from nascompile.compiler.compiled import CompiledModel, compile
from nascompile.compiler.errors import SpaceError
from nascompile.compiler.gain_table import MOST, gain_table
from nascompile.compiler.gains import Gains, find_gains
from nascompile.compiler.graph import GraphWatcher
from nascompile.compiler.islands import Island
from nascompile.compiler.lower import LoweredChoice
from nascompile.compiler.measure import Count, batch_size, check_weighted, count_parameters
from nascompile.compiler.patterns import PATTERNS
from nascompile.compiler.profiler import ChoiceProfile, Shape
from nascompile.compiler.region.members import MERGED
from nascompile.compiler.sizes import count_architectures, extreme_size
from nascompile.compiler.space import Choice, candidate_names, unwrap
from nascompile.compiler.unit import Entry

LONG = 60
"""More lines of candidates than this are shown as ranges."""

GAINS = ("predicted", "measured", None)
NOT_ASKED = "not asked for"

GROUP_WORDS = {"merge": "merged into one layer", "batch": "computed together"}
"""What the patterns of groups do with candidates."""


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One candidate: FLOPs over all calls on the example inputs; `problem` says why it is not measured."""

    name: str
    type: str | None
    parameters: int
    flops: int
    output: Shape | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One choice: what it is, costs, is fed by and feeds, and how it was compiled."""

    path: str
    key: str
    kind: str
    reduction: str
    n_chosen: int | None
    scopes: tuple[str, ...]
    shared_with: tuple[str, ...]
    inside: tuple[str, str] | None
    calls: int
    inputs: Shape | None
    candidates: tuple[CandidateRow, ...]
    parameters: int
    flops: int
    fed_by: tuple[str, ...]
    feeds: tuple[str, ...]
    compiled: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found.

    `total` is the whole supernet; in `smallest` and `largest` every LayerChoice takes its smallest or largest
    candidate, and every input is kept. `unequal` names candidates whose outputs cannot be weighted and added
    up. `edges`: what was fused into what and what that gains, by key, or why that is not known; two reports
    that differ in it only are equal.
    """

    rows: tuple[Row, ...]
    islands: tuple[Island, ...]
    notes: dict[str, str]
    architectures: int
    total: Count
    smallest: Count
    largest: Count
    unequal: str | None
    edges: Gains | str = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _plain(content)

    def to_json(self) -> str:
        """`to_dict` as indented JSON; what is not finite is null."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def render(self, console: Console, *, most: int | None = MOST) -> None:
        """Print tables for a person to read; `most` choices with their gains, None for all."""
        console.print(*self._parts(most), sep="\n")

    def __str__(self) -> str:
        keys = len({row.key for row in self.rows})
        under = f" under {_plural(keys, 'key')}" if keys < len(self.rows) else ""
        lean = _range([self.smallest.parameters, self.largest.parameters])
        size = f"{human(self.total.parameters).strip()} parameters and {human(self.total.flops)}FLOPs"
        islands = f"; {_plural(len(self.islands), 'part')} not traced" if self.islands else ""
        choices = _plural(len(self.rows), "choice") + under
        space = f"{choices}, {_power(self.architectures)} architectures of {lean} parameters"
        return f"{space}; supernet: {size}{islands}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield from self._parts(MOST)

    def _parts(self, most: int | None) -> Iterator[RenderableType]:
        if self.rows:
            compact = sum(len(row.candidates) for row in self._firsts()) > LONG
            yield self._compact_table() if compact else self._table()
            if compact:
                yield self._candidate_table()
        yield self._size_table()
        if isinstance(self.edges, Gains):
            yield gain_table(self.edges, most)
        elif self.rows and self.edges != NOT_ASKED:
            yield Text(f"no gains by choice: {self.edges}", style="dim")
        if self.unequal is not None:
            yield Text(f"a weighted method cannot search this space: {self.unequal}", style="yellow")
        if self.islands:
            yield self._island_table()
        elif self.rows:
            yield Text("traced as a whole: no part runs as plain Python")

    def _firsts(self) -> list[Row]:
        return [rows[0] for rows in self._by_key().values()]

    def _by_key(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.key].append(row)
        return found

    def _table(self) -> Table:
        table = Table(title=f"{_plural(len(self.rows), 'choice')}", title_justify="left", show_lines=True)
        for name in ("choice", "candidates", "parameters", "FLOPs", "output", "feeds", "compiled"):
            table.add_column(name, justify="right" if name in ("parameters", "FLOPs") else "left")
        for rows in self._by_key().values():
            row = rows[0]
            names = [_name(candidate, row.kind) for candidate in row.candidates]
            layer = row.kind == "LayerChoice"
            count = "any" if row.n_chosen is None else row.n_chosen
            heading = [] if layer else [f"{count} of {len(names)} inputs:"]
            table.add_row(
                self._label(rows),
                escape("\n".join([*heading, *names])),
                "\n".join(_range([r.candidates[i].parameters for r in rows]) for i in range(len(names)))
                if layer
                else "",
                "\n".join(_range([r.candidates[i].flops for r in rows]) for i in range(len(names)))
                if layer
                else "",
                escape(_outputs(row)),
                escape(self._feeds(rows)),
                escape(_listed({r.compiled for r in rows})),
            )
        return table

    def _compact_table(self) -> Table:
        table = Table(title=f"{_plural(len(self.rows), 'choice')}", title_justify="left")
        for name in ("choice", "candidates", "parameters", "FLOPs", "feeds", "compiled"):
            table.add_column(name, justify="right" if name in ("parameters", "FLOPs") else "left")
        letters = self._letters()
        for rows in self._by_key().values():
            row = rows[0]
            count = "any" if row.n_chosen is None else row.n_chosen
            names = tuple(candidate.name for candidate in row.candidates)
            layer = row.kind == "LayerChoice"
            table.add_row(
                self._label(rows),
                f"{count} of {len(names)}" + (f" ({letters[names]})" if layer else " inputs"),
                _range([c.parameters for r in rows for c in r.candidates]) if layer else "",
                _range([c.flops for r in rows for c in r.candidates]) if layer else "",
                escape(self._feeds(rows)),
                escape(_listed({r.compiled for r in rows})),
            )
        return table

    def _letters(self) -> dict[tuple[str, ...], str]:
        lists = dict.fromkeys(
            tuple(c.name for c in row.candidates) for row in self.rows if row.kind == "LayerChoice"
        )
        return {names: _letter(index) for index, names in enumerate(lists)}

    def _candidate_table(self) -> Table:
        table = Table(title="candidates", title_justify="left")
        for name in ("", "candidate", "parameters", "FLOPs", "choices"):
            table.add_column(name, justify="left" if name in ("", "candidate") else "right")
        for names, letter in self._letters().items():
            rows = [row for row in self.rows if tuple(c.name for c in row.candidates) == names]
            for index, name in enumerate(names):
                kinds = {row.candidates[index].type for row in rows}
                type_name = f" {next(iter(kinds))}" if name.isdigit() and len(kinds) == 1 else ""
                candidates = [row.candidates[index] for row in rows]
                table.add_row(
                    letter if index == 0 else "",
                    escape(name + type_name),
                    _range([c.parameters for c in candidates]),
                    _range([c.flops for c in candidates]),
                    str(len(rows)) if index == 0 else "",
                )
            table.add_section()
        return table

    def _size_table(self) -> Table:
        sample = self.total.batch is not None
        table = Table(title=f"{_power(self.architectures)} architectures", title_justify="left")
        table.add_column("network")
        table.add_column("parameters", justify="right")
        table.add_column("FLOPs a sample" if sample else "FLOPs", justify="right")
        for name, size in (
            ("supernet, all candidates", self.total),
            ("largest candidates", self.largest),
            ("smallest candidates, every input kept", self.smallest),
        ):
            flops = size.flops_per_sample if size.flops_per_sample is not None else size.flops
            table.add_row(name, human(size.parameters), human(flops))
        return table

    def _island_table(self) -> Table:
        table = Table(title=f"{_plural(len(self.islands), 'part')} run as written", title_justify="left")
        for name in ("part", "where", "why"):
            table.add_column(name, overflow="fold")
        for island in self.islands:
            where = f"{island.file}:{island.line}" if island.file else ""
            table.add_row(
                escape(island.path or "the model's own forward"), escape(where), escape(island.reason)
            )
        return table

    def _label(self, rows: Sequence[Row]) -> RenderableType:
        row = rows[0]
        label = Text(row.key, style="bold")
        if row.key != row.path:
            label.append(f"\n{row.path or '(the model itself)'}", style="dim")
        if len(rows) > 1:
            label.append(f"\nand {len(rows) - 1} more with this key", style="dim")
        if row.inside is not None:
            label.append(f"\ninside {row.inside[0]}, {row.inside[1]}", style="dim")
        if row.calls != 1:
            label.append("\nnever called" if not row.calls else f"\ncalled {row.calls} times", style="dim")
        return label

    def _feeds(self, rows: Sequence[Row]) -> str:
        keys = {row.path: row.key for row in self.rows}
        return _listed(dict.fromkeys(keys.get(path, path.strip("()")) for row in rows for path in row.feeds))


def explain(
    model: nn.Module,
    example_inputs: Any,
    *,
    compiled: CompiledModel | None = None,
    gains: str | None = "predicted",
) -> Explanation:
    """Explain the search space of `model` and how it is compiled.

    With `compiled` (or a compiled `model`) what was compiled there is reported; else the model is compiled
    for this. FLOPs are those of one forward pass on the example inputs. gains: by choice, "predicted" from
    bytes and FLOPs of a training step in the model's present mode, also "measured" (minutes for large
    supernets), None without. The model and its mutator are as before afterwards. Raises ValueError for other
    `gains`, NascompileError when the model does not run on the example inputs.
    """
    if gains not in GAINS:
        raise ValueError(f'gains is {gains!r}, expected one of: "predicted", "measured", None')
    if compiled is None:
        compiled = model if isinstance(model, CompiledModel) else compile(model, example_inputs)
    model = unwrap(model)
    watcher = GraphWatcher(model)
    watcher.run(example_inputs)
    graph, profiles = watcher.graph(), watcher.profiles()
    batch = batch_size(example_inputs)
    outside = watcher.outside_flops()
    how = _compiled_how(compiled)
    rows = []
    for path, profile in profiles.items():
        node = graph.nodes[path]
        candidates = tuple(
            CandidateRow(c["name"], c["type"], c["params"], c["flops"], c["output"], c["error"])
            for c in node["candidates"]
        )
        rows.append(
            Row(
                path=path,
                key=profile.key,
                kind=profile.kind,
                reduction=profile.reduction,
                n_chosen=profile.n_chosen,
                scopes=tuple(node["scopes"]),
                shared_with=tuple(node["shared"]),
                inside=profile.inside,
                calls=len(profile.calls),
                inputs=profile.calls[0] if profile.calls else None,
                candidates=candidates,
                parameters=profile.parameters,
                flops=profile.flops,
                fed_by=tuple(graph.predecessors(path)),
                feeds=tuple(graph.successors(path)),
                compiled=how.get(path) or _called_back(watcher.choices[path], profile, compiled.notes),
            )
        )
    edges: Gains | str = NOT_ASKED
    if gains is not None:
        edges = find_gains(model, compiled, example_inputs, measure=gains == "measured")
    return Explanation(
        rows=tuple(rows),
        islands=tuple(compiled.islands),
        notes=dict(compiled.notes),
        architectures=count_architectures(model),
        total=Count(count_parameters(model), watcher.flops(), batch),
        smallest=extreme_size(model, profiles, outside, min, batch),
        largest=extreme_size(model, profiles, outside, max, batch),
        unequal=_unequal(profiles),
        edges=edges,
    )


def _unequal(profiles: Any) -> str | None:
    try:
        check_weighted(profiles)
    except SpaceError as error:
        return str(error)
    return None


def _compiled_how(compiled: CompiledModel) -> dict[str, str]:
    """By path, for choices that are nodes of a trace: how they combine candidates, or why not fused."""
    how: dict[str, str] = {}
    notes = compiled.notes
    for entry in compiled.entries:
        for choice in entry.lowered:
            how[choice.path] = _outside_regions(choice, entry, notes.get(choice.path))
        for region in entry.regions:
            for choice in region.choices:
                reason = notes.get(region.__name__)
                how[choice.path] = f"{region.__name__} {reason}" if reason else f"fused: {region.__name__}"
    return how


def _outside_regions(choice: LoweredChoice, entry: Entry, note: str | None) -> str:
    """Of a choice that is a node of the graph: what is fused, and why no plan has it."""
    if choice.pattern is None:
        words = [f"traced, not fused: {note}" if note else "traced"]
    else:
        words = [f"fused: {choice.pattern.name}", *([note] if note else [])]
    for group in getattr(choice, "groups", ()):
        names = ", ".join(candidate_names(choice.choice)[member.index] for member in group.members)
        words.append(f"{GROUP_WORDS[group.pattern.name]}: {names}")
    meta = {} if entry.graph_module is None else entry.graph_module.meta
    reason = meta.get("outside", {}).get(choice.path)
    # those that are merged are outside because they are
    if reason is not None and reason != MERGED:
        words.append(f"in no region: {reason}")
    return "; ".join(words)


def _called_back(choice: Choice, profile: ChoiceProfile, notes: dict[str, str]) -> str:
    """Of a choice that is no node of a trace: it is called by an island, or by a candidate, or not at all."""
    if profile.path in notes:
        return f"as written: {notes[profile.path]}"
    if not profile.calls:
        return "never called"
    reasons = {pattern.name: pattern.why_not(choice) for pattern in PATTERNS}
    fitting = next((name for name, reason in reasons.items() if reason is None), None)
    if fitting is not None:
        return f"fused: {fitting}, called from plain Python"
    return "called from plain Python, not fused: " + "; ".join(
        f"{name}: {why}" for name, why in reasons.items()
    )


# words


def human(number: float) -> str:
    """A count with a unit prefix: 950, 1.2 k, 34.5 M, 1.20 G."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # what would be rounded up to 1000 belongs to the next prefix
        if abs(number) >= size * 0.9995:
            return (
                f"{number / size:.3g} {prefix}"
                if abs(number) < 999.5 * size
                else f"{number / size:.0f} {prefix}"
            )
    return f"{number:.0f} " if number == int(number) else f"{number:.1f} "


def _name(candidate: CandidateRow, kind: str) -> str:
    if not candidate.name.isdigit():
        return candidate.name
    if kind == "InputChoice":
        return f"input {candidate.name}"
    return f"{candidate.name} {candidate.type}" if candidate.type else candidate.name


def _range(numbers: Sequence[float]) -> str:
    low, high = human(min(numbers)).strip(), human(max(numbers)).strip()
    return low if low == high else f"{low} to {high}"


def _power(number: int) -> str:
    if number < 100_000:
        return f"{number:,}"
    exponent = int(math.log10(number))
    return f"{number // 10 ** (exponent - 1) / 10:.1f} × 10^{exponent}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"A{index - 25}"


def _listed(items: Iterable[str]) -> str:
    known = list(items)
    return "\n".join(known[:4]) + (f"\nand {len(known) - 4} more" if len(known) > 4 else "")


def _outputs(row: Row) -> str:
    shapes = [
        _shape(candidate.output) if candidate.problem is None else candidate.problem
        for candidate in row.candidates
    ]
    if len(set(shapes)) == 1:
        return shapes[0]
    return "\n".join(shapes if row.kind == "LayerChoice" else ["", *shapes])


def _shape(shape: Shape | None) -> str:
    if shape is None:
        return "none"
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
        return "×".join(map(str, shape)) or "scalar"
    return str(shape)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
