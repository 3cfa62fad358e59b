"""The command line: `nascompile model.py`, and one sub-command for every part of what it does.

Nothing heavy is imported until a command runs, so that `--help` is immediate. What a user can cause ends in
one line on stderr and exit code 2; what is our mistake keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from nascompile import __version__, cli_bench, cli_doctor, cli_model, cli_search

# click lies inside newer releases of typer and beside older ones; its base class for wrong usage is this in
# both
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

_HELP = """The model-graph compiler for neural architecture search with PyTorch.

nascompile MODEL.py searches the space that MODEL.py defines and writes the lean network it finds.
It is short for: nascompile search MODEL.py (see nascompile search --help).
"""

_EPILOG = "--debug with any command shows the traceback of an error."


class _Group(TyperGroup):
    """Takes a first argument that is no command for the model file of `search`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version"):
            if not args[0].startswith("-") and not args[0].endswith(".py") and not Path(args[0]).exists():
                known = ", ".join(self.commands)
                raise typer.BadParameter(f"{args[0]!r} is neither a command nor a file; commands: {known}")
            args = ["search", *args]
        return super().parse_args(ctx, args)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nascompile {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Group,
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    # plain help: rich's takes 0.15 s to import; and errors are ours to print
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("search")(cli_search.search)
app.command("explain")(cli_model.explain)
app.command("draw")(cli_model.draw)
app.command("space")(cli_model.space)
app.command("count")(cli_model.count)
app.command("prune")(cli_model.prune)
app.command("export")(cli_model.export)
app.command("bench")(cli_bench.bench)
app.command("doctor")(cli_doctor.doctor)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    code = run(sys.argv[1:] if args is None else args)
    sys.exit(_flushed(code))


def run(args: Sequence[str]) -> int:
    """Run one command line; returns 0, 2 (bad input, said in one line on stderr) or 130 (interrupted)."""
    debug = "--debug" in args
    try:
        code = app([arg for arg in args if arg != "--debug"], prog_name="nascompile", standalone_mode=False)
    except Exception as error:
        line = explain_error(error)
        if line is None or debug:
            if line is None:
                print("nascompile: this is a bug in nascompile or in the model's own code:", file=sys.stderr)
            raise
        print(f"nascompile: {line}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _flushed(code: int) -> int:
    """Write what is still buffered now, where an error can be told; returns the exit code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # the interpreter flushes again when it ends: into nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1
        print(f"nascompile: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    return code


def explain_error(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for every other."""
    from nascompile.compiler.errors import NascompileError
    from nascompile.runtime.job_folder import storage_trouble

    if isinstance(error, _UsageError):
        return _one_line(error.format_message())  # type: ignore[attr-defined]
    if isinstance(error, NascompileError):
        return _one_line(str(error))
    reason = storage_trouble(error)
    if reason is not None:
        where = f" {str(error.filename)!r}" if isinstance(error, OSError) and error.filename else ""
        return _one_line(f"cannot write{where}: {reason}")
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())
