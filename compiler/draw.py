"""Draws a search space, and an architecture in it, as SVG, PNG or PDF."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath
from torch import nn

from nascompile.compiler.architecture import resolve
from nascompile.compiler.diagram import diagram
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.graph import choice_graph
from nascompile.compiler.layout import Placement, Point, place
from nascompile.compiler.panels import Box, Diagram, Link, Panel
from nascompile.compiler.space import unwrap

SUFFIXES = (".svg", ".png", ".pdf")

# inches
MARGIN, PANEL_GAP, COLUMN_GAP, HEADING = 0.3, 0.4, 0.7, 0.34
PAD, LINE = 0.09, 0.155
TITLE_SIZE, LINE_SIZE, HEADING_SIZE = 8.5, 7.5, 10.0  # points
LONG = 9
"""A drawing with more layers than this grows downwards."""

INK, QUIET, FAINT, CHOSEN, WIRE = "#1f2733", "#5c6675", "#b4bac4", "#14803c", "#8f99a8"
FILLS = {"layer": "#e7effb", "inputs": "#fdf0dc", "end": "#f2f3f5", "join": "#8f99a8"}
EDGES = {"layer": "#4a7fc1", "inputs": "#d58a26", "end": "#9aa3b0", "join": "#8f99a8"}
SHADES = ("#e2f0ec", "#f3e6f4", "#fbeee6", "#e8e9f8", "#f4f2dd", "#e3f1f8")
SHADE_EDGES = ("#3b8f79", "#9a5aa3", "#c0734a", "#6a6fc4", "#9b8f2e", "#3d8fb5")


def draw(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    architecture: str | Path | Mapping[str, Any] | None = None,
) -> Path:
    """Draw the choice graph of `model` to a .svg, .png or .pdf file and return its path.

    With an architecture, what it chooses is highlighted and what the output does not need is faint. Large
    spaces are drawn as an overview and every distinct cell once. Raises NascompileError for another suffix or
    a folder that cannot be written to, ArchitectureError for an architecture of another model.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise NascompileError(
            f"{target.name!r} has the suffix {target.suffix!r}, expected one of: {', '.join(SUFFIXES)}"
        )
    model = unwrap(model)
    masks = None if architecture is None else resolve(model, architecture)
    figure = render(diagram(choice_graph(model, example_inputs), masks))
    # a name of its own first, so that nobody sees half a picture
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}")
    try:
        with rc_context({"svg.hashsalt": "nascompile"}):
            figure.savefig(temporary, format=target.suffix.lower()[1:], dpi=144, metadata=_metadata(target))
        os.replace(temporary, target)
    except OSError as error:
        raise NascompileError(f"cannot write {str(target)!r}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _metadata(target: Path) -> dict[str, Any]:
    # without a date (and with the salt above), equal spaces give equal files
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    creator = {".svg": "Creator", ".png": "Software", ".pdf": "Creator"}[target.suffix.lower()]
    return {creator: "nascompile", **dates.get(target.suffix.lower(), {})}


def render(content: Diagram) -> Figure:
    """The diagram as a figure, whose size follows from its content; an overview stands beside the rest."""
    placed = {id(panel): _place(panel) for panel in content.panels}
    columns = [content.panels] if len(content.panels) == 1 else [content.panels[:1], content.panels[1:]]
    sizes = [_column_size(column, placed) for column in columns]
    legend = [f"{letter}: {', '.join(names)}" for letter, names in content.legend.items()]
    below = (len(legend) + 1) * LINE if legend else 0.0
    width = max(sum(w for w, _ in sizes) + COLUMN_GAP * (len(sizes) - 1), *map(_legend_width, legend), 3.0)
    width, height = width + 2 * MARGIN, max(h for _, h in sizes) + below + 2 * MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    left = (width - sum(w for w, _ in sizes) - COLUMN_GAP * (len(sizes) - 1)) / 2
    for column, size in zip(columns, sizes, strict=True):
        top = height - MARGIN
        for panel in column:
            top = _paint_panel(axes, panel, placed[id(panel)], left, top, size[0]) - PANEL_GAP
        left += size[0] + COLUMN_GAP
    for index, text in enumerate(legend):
        row = MARGIN + (len(legend) - index - 0.5) * LINE
        _text(axes, MARGIN, row, text, LINE_SIZE, QUIET, align="left")
    return figure


def _legend_width(text: str) -> float:
    return _width(text, LINE_SIZE)


def _column_size(column: list[Panel], placed: Mapping[int, Placement]) -> Point:
    sizes = [placed[id(panel)].size for panel in column]
    headings = [_width(panel.title, HEADING_SIZE, True) for panel in column]
    height = sum(h for _, h in sizes) + sum(HEADING for panel in column if panel.title)
    return max(*(w for w, _ in sizes), *headings), height + PANEL_GAP * (len(column) - 1)


def _paint_panel(
    axes: Any, panel: Panel, placement: Placement, left: float, top: float, width: float
) -> float:
    """Paint below `top` and return where the panel ends."""
    if panel.title:
        _text(axes, left, top - HEADING / 3, panel.title, HEADING_SIZE, INK, bold=True, align="left")
        top -= HEADING
    bottom = top - placement.size[1]
    _paint(axes, panel, placement, (left + (width - placement.size[0]) / 2, bottom))
    return bottom


def _place(panel: Panel) -> Placement:
    sizes = {name: _size(box) for name, box in panel.boxes.items()}
    links = [(link.source, link.target) for link in panel.links]
    sideways = place(sizes, links)
    columns = {round(centre[0], 3) for centre in sideways.centres.values()}
    return sideways if len(columns) <= LONG else place(sizes, links, gap=(0.34, 0.22), downwards=True)


def _size(box: Box) -> Point:
    if box.kind == "join":
        return 0.1, 0.1
    texts = [_width(box.title, TITLE_SIZE, True), *(_width(line.text, LINE_SIZE, True) for line in box.lines)]
    return max(texts) + 2.4 * PAD, (1.12 + len(box.lines)) * LINE + 1.6 * PAD


@lru_cache(maxsize=4096)
def _width(text: str, size: float, bold: bool = False) -> float:
    if not text:
        return 0.0
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    # a letter at the end keeps trailing blanks; in inches
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().width) / 72 + 0.02


def _paint(axes: Any, panel: Panel, placement: Placement, origin: Point) -> None:
    for link in sorted(panel.links, key=lambda link: bool(link.alive)):
        if link.source != link.target:
            _paint_link(axes, link, panel, placement, origin)
    for name, box in panel.boxes.items():
        centre = placement.centres[name]
        _paint_box(axes, box, (centre[0] + origin[0], centre[1] + origin[1]))


def _paint_box(axes: Any, box: Box, centre: Point) -> None:
    x, y = centre
    faded = box.alive is False
    if box.kind == "join":
        color = FAINT if faded else (CHOSEN if box.alive else EDGES["join"])
        axes.add_patch(Circle((x, y), 0.05, facecolor=color, edgecolor="none", zorder=3))
        return
    width, height = _size(box)
    fill, edge = FILLS.get(box.kind, ""), EDGES.get(box.kind, "")
    if box.kind == "group":
        fill, edge = SHADES[box.shade % len(SHADES)], SHADE_EDGES[box.shade % len(SHADES)]
    if faded:
        fill, edge = "#fafafa", "#d6dae0"
    shape = f"round,pad=0,rounding_size={height / 2 if box.kind == 'end' else 0.06}"
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height,
            boxstyle=shape, facecolor=fill, edgecolor=edge, linewidth=0.9, zorder=3,
        )
    )  # fmt: skip
    row = y + height / 2 - 0.8 * PAD - 0.56 * LINE
    _text(axes, x, row, box.title, TITLE_SIZE, FAINT if faded else INK, bold=True)
    for index, line in enumerate(box.lines, start=1):
        color = QUIET if line.chosen is None else (CHOSEN if line.chosen else FAINT)
        bold = bool(line.chosen) and not faded
        _text(
            axes, x, row - (index + 0.06) * LINE, line.text, LINE_SIZE, FAINT if faded else color, bold=bold
        )


def _paint_link(axes: Any, link: Link, panel: Panel, placement: Placement, origin: Point) -> None:
    route = [(px + origin[0], py + origin[1]) for px, py in placement.routes[link.source, link.target]]
    (x0, y0), (x1, y1) = route[0], route[-1]
    downwards = _is_downwards(placement)
    forward = (x1 >= x0) if not downwards else (y1 <= y0)
    route[0] = _border(route[0], panel.boxes[link.source], downwards, forward)
    route[-1] = _border(route[-1], panel.boxes[link.target], downwards, not forward)
    color = WIRE if link.alive is None else (CHOSEN if link.alive else "#dde0e5")
    strength = 1.5 if link.alive else 0.9
    style = (0, (3, 2)) if link.nested else "solid"
    curve = _curve(route, downwards)
    axes.add_patch(
        PathPatch(
            curve,
            fill=False,
            edgecolor=color,
            linewidth=strength,
            linestyle=style,
            zorder=2 if link.alive else 1,
        )
    )
    if panel.boxes[link.target].kind != "join":
        axes.add_patch(Polygon(_arrow(route[-1], downwards, forward), closed=True, facecolor=color, zorder=4))


def _is_downwards(placement: Placement) -> bool:
    # the first box lies in the first layer, on the left or at the top, and the last one in the last
    (x0, y0), *_, (x1, y1) = placement.centres.values()
    return abs(y0 - y1) > abs(x0 - x1)


def _border(point: Point, box: Box, downwards: bool, leaving: bool) -> Point:
    width, height = _size(box)
    if box.kind == "join":
        width = height = 0.0
    side = 1.0 if leaving else -1.0
    return (point[0], point[1] - side * height / 2) if downwards else (point[0] + side * width / 2, point[1])


def _curve(route: list[Point], downwards: bool) -> Curve:
    points, codes = [route[0]], [Curve.MOVETO]
    for (xa, ya), (xb, yb) in pairwise(route):
        if downwards:
            middle = (ya + yb) / 2
            points += [(xa, middle), (xb, middle), (xb, yb)]
        else:
            middle = (xa + xb) / 2
            points += [(middle, ya), (middle, yb), (xb, yb)]
        codes += [Curve.CURVE4] * 3
    return Curve(points, codes)


def _arrow(tip: Point, downwards: bool, forward: bool) -> list[Point]:
    length, half = 0.075, 0.033
    sign = 1.0 if forward else -1.0
    x, y = tip
    if downwards:
        return [(x, y), (x - half, y + sign * length), (x + half, y + sign * length)]
    return [(x, y), (x - sign * length, y - half), (x - sign * length, y + half)]


def _text(
    axes: Any,
    x: float,
    y: float,
    text: str,
    size: float,
    color: str,
    *,
    bold: bool = False,
    align: str = "center",
) -> None:
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal", size=size)
    # a name is a name, not mathematics between dollar signs
    axes.text(x, y, text, color=color, ha=align, va="center", fontproperties=font, zorder=5, parse_math=False)
