"""The files a lean network becomes: its weights, its exports, and reading weights back into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.export import export
from nascompile.compiler.prune import prune
from nascompile.runtime.job_folder import WEIGHTS, JobFolder, write_bytes, writing

_SUFFIXES = {"torchscript": ".pt", "pt2": ".pt2", "onnx": ".onnx"}


class WeightsError(NascompileError):
    """A file of weights cannot be read or does not fit the model."""


def weights_of(model: nn.Module) -> bytes:
    """All parameters and buffers as the bytes of a safetensors file."""
    # copies: safetensors refuses tensors that share memory
    return safetensors.torch.save(
        {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises WeightsError when it is missing or damaged."""
    try:
        return safetensors.torch.load(Path(path).read_bytes())
    except OSError as error:
        raise WeightsError(f"weights file {str(path)!r} cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"weights file {str(path)!r} is damaged: {error}") from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy tensors into a model in place, all or none; raises WeightsError that names what does not fit."""
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise WeightsError(
            f"weights file {str(source)!r} does not fit the model: {'; '.join(problems[:3])}{more}"
        )
    model.load_state_dict(dict(tensors))


def prune_with_weights(
    supernet: nn.Module, architecture: Mapping[str, Any], example: tuple[Any, ...], weights: Path | None
) -> nn.Module:
    """The lean network, with the weights in a file: those of the supernet, or of the lean network itself."""
    lean = prune(supernet, architecture, example)
    if weights is None:
        return lean
    tensors = read_weights(weights)
    if tensors.keys() == lean.state_dict().keys():
        load_weights(lean, tensors, weights)
        return lean
    load_weights(supernet, tensors, weights)
    return prune(supernet, architecture, example)


def write_lean(
    folder: JobFolder, lean: nn.Module, example: tuple[Any, ...], formats: tuple[str, ...]
) -> list[Path]:
    """Write the lean network's weights and its exports; returns the paths."""
    paths = [write_bytes(folder / WEIGHTS, weights_of(lean))]
    for name in formats:
        paths.append(export_lean(lean, folder / f"lean{_SUFFIXES[name]}", example, name))
    return paths


def export_lean(lean: nn.Module, path: Path, example: tuple[Any, ...], format: str | None = None) -> Path:
    """Export whole or not at all, in the format named or that of the suffix; returns the path."""
    with writing(path):
        return export(lean, path, example, format=format)
