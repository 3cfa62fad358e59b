"""What a benchmark found: the rows, the ratios and when there are none, as CSV and as a picture."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nascompile.runtime.bench_compare import Error
from nascompile.runtime.bench_peers import PEERS

COLUMNS = (
    *("peer", "ready_s", "median_ms", "p20_ms", "p80_ms", "memory_mib", "speed", "memory_ratio"),
    *("arithmetic", "decision", "note", "machine"),
)

_INK, _FAINT, _OURS, _OTHERS = "#24292f", "#8c959f", "#0969da", "#afb8c1"


@dataclass(slots=True)
class Row:
    """One peer: seconds until its steps run at full speed, milliseconds of a step, MiB at the peak of a step.

    note: why it has no figures (then it `failed`), or what is wrong with its values.
    """

    peer: str
    ready_s: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    memory_mib: float | None = None
    note: str = ""
    failed: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is held against the others."""
        return PEERS[self.peer].is_ours


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of one subject. `flops`: what a step needs; `matmul_rate`: FLOPs a second; `uncompared`: why
    no results could be compared."""

    title: str
    rows: list[Row]
    errors: list[Error]
    flops: float | None
    matmul_rate: float
    machine: str
    decision: str
    notes: list[str] = field(default_factory=list)
    uncompared: str = ""

    @property
    def wrong(self) -> list[str]:
        """Why there are no ratios; empty where all is well."""
        failed = [f"{row.peer}: {row.note}" for row in self.rows if row.is_ours and row.failed]
        missing = [self.uncompared] if self.uncompared else []
        return missing + failed + [str(error) for error in self.errors if error.is_wrong]

    def speed(self, row: Row) -> float | None:
        """How many times faster than the fastest other peer; None while a comparison fails."""
        return self._ratio(row, "median_ms")

    def memory_ratio(self, row: Row) -> float | None:
        """How many times less memory than the leanest other peer; None while a comparison fails."""
        return self._ratio(row, "memory_mib")

    def arithmetic(self, row: Row) -> float | None:
        """The share of the rate of matrix products at which a peer does the arithmetic of a step."""
        if self.flops is None or row.median_ms is None or not self.flops:
            return None
        return self.flops / (row.median_ms * 1e-3) / self.matmul_rate

    def _ratio(self, row: Row, name: str) -> float | None:
        mine = getattr(row, name)
        others = [
            getattr(other, name)
            for other in self.rows
            if not other.is_ours and not other.note and getattr(other, name) is not None
        ]
        if self.wrong or not mine or not others or (row.note and not row.is_ours):
            return None
        return min(others) / mine

    def cells(self, row: Row) -> dict[str, Any]:
        """One row by COLUMNS; None where there is nothing to say."""
        return {
            "peer": row.peer,
            "ready_s": row.ready_s if row.median_ms is not None else None,
            "median_ms": row.median_ms,
            "p20_ms": row.p20_ms,
            "p80_ms": row.p80_ms,
            "memory_mib": row.memory_mib,
            "speed": self.speed(row),
            "memory_ratio": self.memory_ratio(row),
            "arithmetic": self.arithmetic(row),
            "decision": self.decision,
            "note": row.note,
            "machine": self.machine,
        }


def machine(settings: Any) -> str:
    """The processor or GPU and the versions that a figure belongs to."""
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    if settings.device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(settings.device)}, CUDA {torch.version.cuda}, {versions}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {threads}, {versions}"


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )


def write_csv(report: Report, path: Path) -> None:
    """One line a peer."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        for row in report.rows:
            cells = report.cells(row).items()
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in cells if v is not None})


def plot(report: Report, path: Path) -> None:
    """Bars: time of a step with its spread, peak memory, time until ready; a panel for each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report.rows
    figure = Figure(figsize=(11, 1.35 + 0.42 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(1.5, 1, 1))
    panels = (
        ("one training step, ms (line: 20th to 80th percentile)", "median_ms", "speed"),
        ("peak memory of a step, MiB", "memory_mib", "memory_ratio"),
        ("compiling, s", "ready_s", None),
    )
    for panel, (title, name, ratio) in zip(axes, panels, strict=True):
        cells = [report.cells(row) for row in rows]
        _bars(panel, rows, [cell[name] for cell in cells], [cell[ratio] if ratio else None for cell in cells])
        panel.set_title(title, loc="left", fontsize=9, color=_INK)
    for index, row in enumerate(rows):
        if row.median_ms is None:
            axes[0].text(0, index, f" {_clip(row.note)}", va="center", fontsize=8, color=_FAINT)
        elif row.p20_ms is not None and row.p80_ms is not None:
            axes[0].plot([row.p20_ms, row.p80_ms], [index, index], color=_INK, lw=1.2)
    axes[0].set_yticks(range(len(rows)), [row.peer for row in rows])
    axes[0].invert_yaxis()
    state = "WRONG RESULT, no ratios" if report.wrong else "ratios: against the best other peer"
    figure.suptitle(f"{report.title}   ({state})", x=0.01, ha="left", fontsize=11, color=_INK)
    figure.supxlabel(report.machine, x=0.01, ha="left", fontsize=7, color=_FAINT)
    figure.savefig(path, dpi=150)


def _bars(
    panel: Any, rows: Sequence[Row], sizes: Sequence[float | None], ratios: Sequence[float | None]
) -> None:
    known = [size or 0.0 for size in sizes]
    panel.barh(
        range(len(rows)), known, color=[_OURS if row.is_ours else _OTHERS for row in rows], height=0.62
    )
    for index, (row, size, ratio) in enumerate(zip(rows, sizes, ratios, strict=True)):
        if size is None:
            continue
        # beyond the whisker
        end = max(size, row.p80_ms or 0.0) if size == row.median_ms else size
        label = f"{size:.3g}" + (f"   {ratio:.2f}×" if ratio is not None else "")
        panel.annotate(
            label,
            (end, index),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
            fontweight="bold" if row.is_ours else "normal",
        )
    panel.set_xlim(
        0, 1.45 * max([*known, *(row.p80_ms or 0.0 for row in rows if row.median_ms in sizes), 1e-9])
    )
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)
    panel.tick_params(labelsize=8, colors=_FAINT)
    panel.tick_params(axis="y", labelcolor=_INK, length=0)


def _clip(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
