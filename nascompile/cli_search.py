"""`nascompile model.py`: the whole line from a model file to a lean network."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nascompile.cli_options import ModelArgument

_METHODS = "darts, darts-unrolled, enas, random"


def search(
    model: ModelArgument,
    method: Annotated[
        str | None, typer.Option(help=f"{_METHODS}.  [default: darts]", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the search.  [default: 50]")] = None,
    retrain: Annotated[
        int | None, typer.Option(help="Epochs of training the lean network from fresh weights.  [default: 0]")
    ] = None,
    inherit: Annotated[
        bool | None, typer.Option("--inherit", help="Start retraining from the supernet's weights.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Output folder.  [default: runs/<name of the file>]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier run in it first.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...  [default: auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.  [default: 0]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="[default: 64]")] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16, fp16 (autocast).  [default: no]")] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="torchscript, pt2, onnx; repeat for several.  [default: torchscript and pt2]",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load data.  [default: 0]")] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Run the supernet eagerly.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the final table only.")] = False,
) -> None:
    """Search, prune, retrain, export, compare: the whole line."""
    given = {
        "method": method,
        "epochs": epochs,
        "retrain": retrain,
        "inherit": inherit,
        "device": device,
        "seed": seed,
        "batch_size": batch_size,
        "precision": precision,
        "formats": tuple(format) if format else None,
        "workers": workers,
        "compile": False if no_compile else None,
    }
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    folder = out or Path("runs") / model.stem
    from nascompile import __version__
    from nascompile.cli_screen import Screen
    from nascompile.runtime.job import SearchJob

    screen = Screen(quiet=quiet)
    with _continuable(model, folder, screen):
        job = SearchJob(
            model,
            folder,
            screen,
            given,
            resume=resume,
            overwrite=overwrite,
            versions={"nascompile": __version__},
        )
        screen.title(model, job.settings)
        summary = job.run()
    screen.summary(summary, folder)


@contextmanager
def _continuable(model: Path, folder: Path, screen: Any) -> Iterator[None]:
    """Say how to go on when the run is interrupted or the disk is full."""
    from nascompile.runtime.job_folder import JobFolder, JobFolderError, out_of_room

    command = f"nascompile {shlex.quote(str(model))} --out {shlex.quote(str(folder))} --resume"
    try:
        yield
    except KeyboardInterrupt:
        screen.end()
        if JobFolder(folder).is_run:
            screen.warn(f"interrupted; continue with: {command}")
        else:
            screen.warn("interrupted before anything was written")
        raise typer.Exit(130) from None
    except Exception as error:
        screen.end()
        if out_of_room(error) and JobFolder(folder).is_run:
            raise JobFolderError(f"{error}; make room, then continue with: {command}") from error
        raise
