"""What a search shows on the terminal: facts, a progress bar for each task, and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from nascompile import __version__
from nascompile.cli_options import grouped, short
from nascompile.runtime.report import Figures, ratio

if TYPE_CHECKING:
    from nascompile.runtime.job import Summary
    from nascompile.runtime.job_settings import Settings

_TASKS = {"search": "searching", "retrain": "retraining"}


class Screen:
    """Implements the job's Observer with rich. With `quiet`, only the final table and warnings are shown."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._steps = 0
        self._previous = ""

    def title(self, model: Path, settings: Settings) -> None:
        """The first line: what runs, and how."""
        facts = (
            f"nascompile {__version__}",
            str(model),
            settings.method,
            settings.device,
            f"seed {settings.seed}",
        )
        self._print(f"[bold]{escape(' · '.join(facts))}[/bold]")

    def say(self, topic: str, line: str) -> None:
        """One fact; the topic is shown where it changes."""
        shown = "" if topic == self._previous else topic
        self._previous = topic
        if self._quiet:
            return
        # a grid, so that long lines are continued below their beginning
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="cyan", min_width=9)
        grid.add_column()
        grid.add_row(escape(shown), escape(line))
        self.console.print(Padding(grid, (0, 0, 0, 2), expand=False))

    def warn(self, line: str) -> None:
        """A line on stderr, also when quiet."""
        print(f"nascompile: {line}", file=sys.stderr)

    def space(self, explanation: Any) -> None:
        """The search space in short."""
        self.say("space", str(explanation))

    def begin(self, task: str, epochs: int, done: int, steps: int) -> None:
        """Start a progress bar."""
        self._previous = ""
        if self._quiet:
            return
        name = _TASKS[task]
        if done:
            self.say(task, f"continuing after epoch {done} of {epochs}")
        self._steps = max(1, steps)
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("[cyan]{task.description:<11}[/cyan]"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[epochs]}"),
            TextColumn("[dim]{task.fields[figures]}[/dim]"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
        )
        self._progress.start()
        self._epochs = epochs
        self._done = done
        self._task = self._progress.add_task(
            name,
            total=epochs * self._steps,
            completed=done * self._steps,
            epochs=f"{done}/{epochs}",
            figures="",
        )

    def step(self) -> None:
        """Move the bar on by one step."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Show the averages of an epoch."""
        if self._progress is None or self._task is None:
            return
        self._done += 1
        self._progress.update(
            self._task,
            completed=self._done * self._steps,
            epochs=f"{self._done}/{self._epochs}",
            figures=_figures(record),
        )

    def end(self) -> None:
        """Close the progress bar, if there is one."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, summary: Summary, folder: Path) -> None:
        """The final table, and what was written."""
        self.console.print()
        self.console.print(_comparison(summary))
        names = ", ".join(str(path.relative_to(folder)) for path in summary.files)
        self._print(f"\nwritten to [bold]{escape(str(folder))}[/bold]: {escape(names)}")

    def _print(self, markup: str) -> None:
        if not self._quiet:
            self.console.print(markup)


def _figures(record: Mapping[str, Any]) -> str:
    shown = {"loss": record.get("train_loss")} | {
        name.removeprefix("valid_"): value
        for name, value in record.items()
        if name.startswith("valid_") and name != "valid_loss"
    }
    return "  ".join(f"{name} {float(value):.3f}" for name, value in shown.items() if value is not None)


def _comparison(summary: Summary) -> Table:
    before, after = summary.supernet, summary.lean
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("", style="cyan")
    for heading in ("supernet", "lean", ""):
        table.add_column(heading, justify="right")
    table.add_row(
        "parameters",
        grouped(before.parameters),
        grouped(after.parameters),
        ratio(before.parameters, after.parameters),
    )
    table.add_row(
        "FLOPs a sample",
        short(before.flops).strip(),
        short(after.flops).strip(),
        ratio(before.flops, after.flops),
    )
    for part in ("valid", "test"):
        for name, value, other in _metrics(before, after, part):
            table.add_row(f"{part} {name}", f"{value:.4f}", f"[bold]{other:.4f}[/bold]", "")
    batch = f"ms, batch of {summary.batch_size}"
    for label, field in ((f"forward, {batch}", "forward_ms"), (f"forward + backward, {batch}", "step_ms")):
        slow, fast = getattr(before, field), getattr(after, field)
        table.add_row(label, f"{slow:.2f}", f"{fast:.2f}", ratio(slow, fast))
    return table


def _metrics(before: Figures, after: Figures, part: str) -> list[tuple[str, float, float]]:
    left, right = getattr(before, part), getattr(after, part)
    if left is None or right is None:
        return []
    return [(name, left[name], right[name]) for name in left if name in right and name != "loss"]
