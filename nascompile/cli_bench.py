"""`nascompile bench`: the training step of a model, ours beside eager PyTorch and torch.compile."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nascompile.cli_options import ModelArgument, short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from nascompile.runtime.bench_report import Report, Row

FILES = ("bench.csv", "bench.png")
WIDTH = 160
"""Letters of a line where nobody says how many there are."""


def bench(
    model: ModelArgument,
    batch_size: Annotated[
        int | None,
        typer.Option(help="[default: 64 of dataset_train, else that of example_inputs]", show_default=False),
    ] = None,
    sampled: Annotated[
        bool, typer.Option("--sampled", help="One sampled path instead of soft weights.")
    ] = False,
    peers: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="What to compare, separated by commas.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of timed steps, for each peer.")] = 5.0,
    compile_limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="What a peer may take to compile.")
    ] = 120.0,
    threads: Annotated[
        int | None, typer.Option(help="Of the CPU.  [default: torch's]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Output folder.  [default: runs/<name of the file>-bench]"),
    ] = None,
) -> None:
    """Time and memory of a training step, beside others."""
    from functools import partial

    from nascompile.runtime.bench import BenchSettings
    from nascompile.runtime.bench import bench as run_bench
    from nascompile.runtime.bench_report import plot, write_csv
    from nascompile.runtime.bench_subject import from_file
    from nascompile.runtime.job_folder import JobFolder

    if batch_size is not None and batch_size < 1:
        raise typer.BadParameter(f"batch-size is {batch_size}, expected at least 1")
    settings = BenchSettings(
        decision="sampled" if sampled else "soft",
        peers=_names(peers),
        seconds=seconds,
        limit=compile_limit,
        threads=threads,
        device=_device(device),
        seed=seed,
    )
    folder = JobFolder(out or Path("runs") / f"{model.stem}-bench")
    _check_folder(folder.path)
    console = _console()
    recipe = partial(from_file, model, batch_size, seed)
    with console.status("") as status:
        report = run_bench(recipe, settings, say=status.update, title=f"{model.name}, {settings.decision}")
    _show(console, report)
    folder.publish(FILES[0], lambda path: write_csv(report, path))
    folder.publish(FILES[1], lambda path: plot(report, path))
    console.print(f"\nwritten to {folder.path}: {', '.join(FILES)}", markup=False)
    if report.wrong:
        raise typer.Exit(1)


def _console() -> Console:
    """Where the table goes: as wide as the terminal, as COLUMNS says, or so wide that a file or a pipe gets
    all of it."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else WIDTH)


def _names(peers: str | None) -> tuple[str, ...]:
    if peers is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in peers.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter(f"--peers is {peers!r}, expected names separated by commas")
    return names


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and name != "cuda" and not name.startswith("cuda:"):
        raise typer.BadParameter(f"device is {name!r}, expected one of: auto, cpu, cuda, cuda:0, cuda:1, ...")
    if name != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"device is {name!r}, but torch sees no GPU")
    return name


def _check_folder(path: Path) -> None:
    from nascompile.runtime.job_folder import JobFolderError

    if path.exists() and not path.is_dir():
        raise JobFolderError(f"output folder {str(path)!r} is a file, expected a folder or nothing")


def _show(console: Console, report: Report) -> None:
    from rich.markup import escape

    console.print(_table(report))
    for note in report.notes:
        console.print(f"  {escape(note)}", style="dim")
    if report.errors:
        console.print(_error_table(report))
    if report.flops:
        rate, flops = short(report.matmul_rate), short(report.flops)
        console.print(f"a step needs {flops}FLOPs; matrix products run at {rate}FLOPs a second here")
    console.print(escape(report.machine), style="dim")
    for problem in report.wrong:
        console.print(f"[bold red]WRONG, no ratios:[/bold red] {escape(problem)}")


def _table(report: Report) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(report.title), title_justify="left", box=None, padding=(0, 2), header_style="bold"
    )
    table.add_column("", style="cyan", no_wrap=True)
    for heading in ("compiling", "step, ms", "20-80 %", "speed", "memory, MiB", "less memory", "arithmetic"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in report.rows:
        table.add_row(*_cells(report, row), escape(row.note), style="bold" if row.is_ours else None)
    return table


def _cells(report: Report, row: Row) -> list[str]:
    cells = report.cells(row)
    spread = "" if row.p20_ms is None else f"{row.p20_ms:.3g}-{row.p80_ms:.3g}"
    return [
        row.peer,
        _number(cells["ready_s"], "{:.1f} s"),
        _number(cells["median_ms"], "{:.4g}"),
        spread,
        _number(cells["speed"], "{:.2f}x"),
        _number(cells["memory_mib"], "{:.1f}"),
        _number(cells["memory_ratio"], "{:.2f}x"),
        _number(cells["arithmetic"], "{:.0%}"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _error_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title="relative error against fp64", title_justify="left", box=None, padding=(0, 2))
    table.add_column("", style="cyan")
    for heading in ("nascompile", "eager", ""):
        table.add_column(heading, justify="right")
    for error in report.errors:
        verdict = "[bold red]wrong[/bold red]" if error.is_wrong else "[green]ok[/green]"
        table.add_row(error.name, f"{error.ours:.2g}", f"{error.eager:.2g}", verdict)
    return table
