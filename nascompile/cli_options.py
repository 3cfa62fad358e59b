"""Arguments that several commands share, and the way commands print figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL.py", show_default=False, help="The model file.")
]
ArchitectureArgument = Annotated[
    Path, typer.Argument(metavar="ARCHITECTURE.json", show_default=False, help="The architecture file.")
]
ArchitectureOption = Annotated[
    Path | None,
    typer.Option("--architecture", "-a", metavar="FILE", help="An architecture file.", show_default=False),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights (.safetensors) of the supernet, or of the lean network.",
        show_default=False,
    ),
]


def grouped(number: float) -> str:
    """A whole number with thousands separated: `1,234,567`."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """A large number to three figures, to be followed by its unit: `12.3 M`, `123 `."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g} "
