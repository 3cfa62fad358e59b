"""The gains of a model as a table for people: a line of figures for every choice, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nascompile.compiler.gains import EdgeGain, Gains, Pair

MOST = 20
"""Choices that are shown one by one unless all are asked for."""


def gain_table(gains: Gains, most: int | None = MOST) -> Table:
    """The costliest choices, the others in one line, and totals; None for `most` shows all."""
    batch = "" if gains.batch is None else f" with a batch of {gains.batch}"
    title = f"what plans gain, in ms of one training step{batch}"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("choice, and what computes its candidates", overflow="fold")
    is_measured = any(edge.measured is not None for edge in gains.edges)
    for kind in ("predicted", "measured") if is_measured else ("predicted",):
        table.add_column(f"{kind}\neager", justify="right", no_wrap=True)
        table.add_column("\nplan", justify="right", no_wrap=True)
        table.add_column("\ngain", justify="right", no_wrap=True)
    shown, rest = gains.edges[:most], gains.edges[len(gains.edges[:most]) :]
    first: dict[tuple[tuple[str, str], ...], str] = {}
    for edge in shown:
        table.add_row(_label(edge, first), *_figures(edge.predicted), *_measured([edge], is_measured))
    if rest:
        predicted = total([edge.predicted for edge in rest])
        table.add_row(f"{len(rest)} more choices", *_figures(predicted), *_measured(rest, is_measured))
    _add_totals(table, gains, is_measured)
    table.caption = Text(
        f"predicted: the least time for bytes and FLOPs at {gains.machine.bandwidth / 1e9:.0f} GB/s and "
        f"{gains.machine.rate / 1e9:.0f} GFLOP/s. What several choices share counts in equal parts."
    )
    table.caption_justify = "left"
    return table


def total(pairs: Sequence[Pair]) -> Pair:
    """The sum; of plans where one has a part in any of them."""
    plans = [pair.plan for pair in pairs if pair.plan is not None]
    return Pair(sum(pair.eager for pair in pairs), sum(plans) if plans else None)


def _add_totals(table: Table, gains: Gains, is_measured: bool) -> None:
    # what a nested choice costs is in the figures of the one around it
    outer = [edge for edge in gains.edges if not edge.is_nested]
    predicted = Pair(
        total([edge.predicted for edge in outer]).eager, total([edge.predicted for edge in gains.edges]).plan
    )
    table.add_section()
    measured: list[str] = []
    if is_measured:
        pairs = [edge.measured for edge in outer if edge.measured is not None]
        plans = [edge.measured for edge in gains.edges if edge.measured is not None]
        measured = _figures(Pair(total(pairs).eager, total(plans).plan))
    table.add_row("[bold]all choices[/bold]", *_figures(predicted), *measured)
    outside = [_ms(gains.rest.eager), _ms(gains.rest.plan or 0.0), ""]
    measured = ["", _ms(gains.rest_measured or 0.0), ""] if is_measured else []
    table.add_row(
        "[bold]outside of choices[/bold]; of the model compiled, only what is in plans", *outside, *measured
    )
    if gains.step is not None:
        table.add_row(
            "[bold]a whole step[/bold], timed on its own: with Python, and what is outside of plans",
            *("", "", ""),
            *_figures(gains.step),
        )


def _measured(edges: Sequence[EdgeGain], is_measured: bool) -> list[str]:
    pairs = [edge.measured for edge in edges if edge.measured is not None]
    return _figures(total(pairs)) if is_measured else []


def _figures(pair: Pair) -> list[str]:
    if pair.plan is None:
        return [_ms(pair.eager), "no plan", ""]
    return [
        _ms(pair.eager),
        _ms(pair.plan),
        f"{pair.eager / pair.plan:.1f}x" if pair.eager and pair.plan else "",
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _label(edge: EdgeGain, first: dict[tuple[tuple[str, str], ...], str]) -> RenderableType:
    """The key, the fate of every candidate (once where choices are alike), and what is shared."""
    heading = Text(edge.key, style="bold")
    if edge.places > 1:
        heading.append(f" in {edge.places} places", style="dim not bold")
    alike = first.setdefault(edge.fates, edge.key)
    words = {fate for _, fate in edge.fates}
    lines = Table.grid(padding=(0, 1))
    if alike != edge.key and edge.fates:
        return Group(heading, *_indented([f"candidates as in {alike}"]), *_shared(edge))
    if len(words) == 1 and len(edge.fates) > 1:
        return Group(heading, *_indented([f"every candidate: {words.pop()}"]), *_shared(edge))
    for name, fate in edge.fates:
        lines.add_row(Text(f"{name}:"), Text(fate))
    return Group(heading, *([Padding(lines, (0, 0, 0, 2))] if edge.fates else []), *_shared(edge))


def _shared(edge: EdgeGain) -> list[Padding]:
    return _indented([f"shares {line}" for line in edge.shared], style="dim")


def _indented(lines: Iterable[str], style: str = "") -> list[Padding]:
    return [Padding(Text(line, style=style), (0, 0, 0, 2)) for line in lines]
