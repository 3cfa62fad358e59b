"""Pictures of a search: its curves, and the weight of every candidate over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#24292f"
_FAINT = "#8c959f"
_COLOURS = {"train": "#0969da", "valid": "#bc4c00"}
_MAP = "viridis"
# inches, and how many rows of a heat map stand below each other before a new column starts
_ROW = 0.19
_GAP = 0.42
_ROWS_A_COLUMN = 56
# a tick label a column of pixels is enough
_MOST_TICKS = 8


def plot_history(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Loss and every metric by epoch, training and validation in one panel; writes a picture to `path`.

    `history` has one dict an epoch: "epoch" (from 0), "train_<name>" and "valid_<name>".
    """
    from matplotlib.ticker import MaxNLocator

    names = _measured(history)
    figure = _figure(4.2 * max(1, len(names)), 3.1)
    epochs = [int(record["epoch"]) + 1 for record in history]
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        for part, colour in _COLOURS.items():
            points = [
                (e, r[f"{part}_{name}"])
                for e, r in zip(epochs, history, strict=True)
                if f"{part}_{name}" in r
            ]
            if points:
                marker = "o" if len(points) < 40 else None
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=3, lw=1.6, label=part)
        axes.set_title(name, loc="left", color=_INK, fontsize=10)
        axes.set_xlabel("epoch", color=_FAINT, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#d0d7de", lw=0.6)
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
        _quiet(axes)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=11)
    figure.savefig(path, dpi=150)


def plot_decisions(
    decisions: Sequence[Mapping[str, Sequence[float]]],
    candidates: Mapping[str, Sequence[str]],
    chosen: Mapping[str, Sequence[Any]],
    path: Path,
    *,
    title: str,
) -> None:
    """A heat map for every key: candidates down, epochs across, the weight as colour; the chosen ones are
    marked.

    `decisions` has one dict an epoch: key to a weight for each candidate. `candidates` are the names,
    `chosen` the final mask. Choices that kept all of their candidates all the time are left out, unless all
    did.
    """
    keys = [key for key in candidates if any(set(epoch[key]) != {1.0} for epoch in decisions)] or [
        *candidates
    ]
    columns = _columns(keys, candidates)
    tallest = max(sum(len(candidates[key]) * _ROW + _GAP for key in column) for column in columns)
    figure = _figure(5.4 * len(columns) + 0.6, max(2.0, tallest + 0.9))
    highest = max(max(epoch[key]) for epoch in decisions for key in keys)
    grid = figure.add_gridspec(1, len(columns), wspace=0.1)
    image = None
    every: list[Axes] = []
    for index, column in enumerate(columns):
        used = sum(len(candidates[key]) * _ROW + _GAP for key in column)
        heights = [len(candidates[key]) * _ROW + _GAP for key in column] + [max(0.001, tallest - used)]
        cells = grid[index].subgridspec(len(column) + 1, 1, height_ratios=heights)
        for row, key in enumerate(column):
            axes = figure.add_subplot(cells[row])
            weights = [[epoch[key][i] for epoch in decisions] for i in range(len(candidates[key]))]
            image = axes.imshow(
                weights, aspect="auto", cmap=_MAP, vmin=0, vmax=highest, interpolation="nearest"
            )
            _label_rows(axes, key, candidates[key], chosen.get(key, ()), len(decisions))
            every.append(axes)
            if row == len(column) - 1:
                _label_epochs(axes, len(decisions))
    assert image is not None
    bar = figure.colorbar(image, ax=every, fraction=0.03, pad=0.03, aspect=30, shrink=min(1.0, 3 / tallest))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=_FAINT, length=0)
    figure.suptitle(f"{title}  (● chosen)", x=0.01, ha="left", color=_INK, fontsize=11)
    figure.savefig(path, dpi=150)


def _measured(history: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for record in history:
        for name in record:
            part, _, measured = name.partition("_")
            if part in _COLOURS and measured:
                found[measured] = None
    # the loss first, then the metrics in their own order
    return sorted(found, key=lambda name: name != "loss")


def _figure(width: float, height: float) -> Figure:
    # without pyplot: no display, no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _columns(keys: Sequence[str], candidates: Mapping[str, Sequence[str]]) -> list[list[str]]:
    columns: list[list[str]] = [[]]
    rows = 0
    for key in keys:
        size = len(candidates[key]) + 2
        if columns[-1] and rows + size > _ROWS_A_COLUMN:
            columns.append([])
            rows = 0
        columns[-1].append(key)
        rows += size
    return columns


def _label_rows(axes: Axes, key: str, names: Sequence[str], chosen: Sequence[Any], epochs: int) -> None:
    axes.set_title(key, loc="left", color=_INK, fontsize=9, pad=3)
    axes.set_yticks(range(len(names)), [_clip(name) for name in names])
    axes.tick_params(axis="y", labelsize=8, colors=_INK, length=0)
    axes.set_xticks([])
    _quiet(axes, frame=False)
    for index, weight in enumerate(chosen):
        if float(weight) > 0:
            axes.annotate(
                "●",
                (epochs - 0.5, index),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=_INK,
            )


def _label_epochs(axes: Axes, epochs: int) -> None:
    step = max(1, -(-epochs // _MOST_TICKS))
    ticks = list(range(0, epochs, step))
    axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    axes.tick_params(axis="x", labelsize=8, colors=_FAINT, length=0)
    axes.set_xlabel("epoch", color=_FAINT, fontsize=8)


def _quiet(axes: Axes, *, frame: bool = True) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(frame and side in ("left", "bottom"))
        spine.set_color(_FAINT)
    if frame:
        axes.tick_params(labelsize=8, colors=_FAINT)


def _clip(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
