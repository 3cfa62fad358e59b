"""The commands on a model file that do not search: explain, draw, space, count, prune, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nascompile.cli_options import (
    ArchitectureArgument,
    ArchitectureOption,
    ModelArgument,
    WeightsOption,
    grouped,
    short,
)

if TYPE_CHECKING:
    from torch import nn

_PICTURES = (".svg", ".png", ".pdf")


def explain(
    model: ModelArgument,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every choice, eager and in plans.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            show_default=False,
            help="Of dataset_train; one sample without it, 64 with --measure.",
        ),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="All choices, not only the costliest.")] = False,
) -> None:
    """What is open in the model, and what was compiled into what."""
    from nascompile.compiler.explain import explain as explain_model

    if measure or batch_size is not None:
        supernet, example = _with_batch(model, batch_size)
    else:
        supernet, example = _load(model)
    explanation = explain_model(supernet, example, gains="measured" if measure else "predicted")
    if json:
        print(explanation.to_json())
        return
    from rich.console import Console

    from nascompile.compiler.gain_table import MOST

    explanation.render(Console(highlight=False), most=None if show_all else MOST)


def draw(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture: .svg, .png or .pdf.")
    ] = Path("space.svg"),
    architecture: ArchitectureOption = None,
) -> None:
    """Draw the choice graph, and an architecture in it."""
    from nascompile.compiler.draw import draw as draw_model

    _suffix(output, _PICTURES)
    supernet, example = _load(model)
    _write(output, lambda path: draw_model(supernet, path, example, architecture=_optional(architecture)))


def space(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write to a file.", show_default=False),
    ] = None,
) -> None:
    """Print the search space as JSON, in NNI's format."""
    import json

    from nascompile.compiler.architecture import search_space

    supernet = _supernet(model)
    text = json.dumps(search_space(supernet), sort_keys=True, indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        _write(output, lambda path: path.write_text(text, encoding="utf-8"))


def count(
    model: ModelArgument,
    architecture: ArchitectureOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Parameters and FLOPs of supernet and lean network."""
    from nascompile.compiler.measure import count as count_model

    supernet, example = _load(model)
    counts = {"supernet": count_model(supernet, example)}
    if architecture is not None:
        counts["lean"] = count_model(supernet, example, architecture=_optional(architecture))
    if json:
        from json import dumps

        figures = {name: {"parameters": c.parameters, "flops": c.flops} for name, c in counts.items()}
        print(dumps(figures, indent=2))
        return
    _show_counts(counts)


def prune(
    model: ModelArgument,
    architecture: ArchitectureArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The lean network's weights (.safetensors)."),
    ] = Path("lean.safetensors"),
    weights: WeightsOption = None,
    code: Annotated[bool, typer.Option("--code", help="Print the lean network's forward as Python.")] = False,
) -> None:
    """Prune to an architecture, write the lean weights."""
    from nascompile.compiler.measure import count as count_model
    from nascompile.runtime.artefacts import prune_with_weights, weights_of

    _suffix(output, (".safetensors",))
    supernet, example = _load(model)
    lean: Any = prune_with_weights(supernet, _architecture(architecture), example, weights)
    _write(output, lambda path: path.write_bytes(weights_of(lean)))
    if code:
        print(lean.code)
    _show_counts({"lean": count_model(lean, example)})


def export(
    model: ModelArgument,
    architecture: ArchitectureArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file: .pt, .pt2 or .onnx.")
    ] = Path("lean.pt2"),
    weights: WeightsOption = None,
) -> None:
    """Prune to an architecture, export the lean network."""
    from nascompile.compiler.export import SUFFIXES
    from nascompile.runtime.artefacts import export_lean, prune_with_weights

    _suffix(output, tuple(SUFFIXES))
    supernet, example = _load(model)
    lean = prune_with_weights(supernet, _architecture(architecture), example, weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"wrote {export_lean(lean, output, example)}")


def _supernet(path: Path) -> nn.Module:
    from nascompile.runtime.ingredients import build_supernet
    from nascompile.runtime.model_file import ModelFile

    return build_supernet(ModelFile(path))


def _load(path: Path) -> tuple[nn.Module, tuple[Any, ...]]:
    from nascompile.runtime.ingredients import build_supernet, example_of
    from nascompile.runtime.model_file import ModelFile

    file = ModelFile(path)
    supernet = build_supernet(file)
    return supernet, example_of(file, supernet)


def _with_batch(path: Path, batch_size: int | None) -> tuple[nn.Module, tuple[Any, ...]]:
    from nascompile.runtime.bench_subject import from_file

    subject = from_file(path, batch_size, 0)
    return subject.model, subject.inputs


def _architecture(path: Path) -> dict[str, Any]:
    from nascompile.compiler.architecture import load_architecture

    return load_architecture(path)


def _optional(path: Path | None) -> dict[str, Any] | None:
    return None if path is None else _architecture(path)


def _suffix(path: Path, known: tuple[str, ...]) -> str:
    if path.suffix not in known:
        raise typer.BadParameter(
            f"output {str(path)!r} ends in {path.suffix!r}, expected one of: {', '.join(known)}"
        )
    return path.suffix


def _write(path: Path, write: Any) -> None:
    from nascompile.runtime.job_folder import JobFolder

    JobFolder(path.parent).publish(path.name, write)
    print(f"wrote {path}")


def _show_counts(counts: dict[str, Any]) -> None:
    for name, found in counts.items():
        print(f"{name}: {grouped(found.parameters)} parameters, {short(found.flops)}FLOPs")
