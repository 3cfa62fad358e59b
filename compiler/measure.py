"""Honest numbers: parameters and FLOPs of a network, of a supernet and of any of its architectures.

One multiply-add is 2 FLOPs. Counted are matrix products (linear layers, einsum, matrix-vector and dot
products), convolutions (also transposed, grouped, depthwise), scaled dot product attention and recurrent
layers, with torch.utils.flop_counter. Not counted: normalisation, pooling, activations, element-wise
arithmetic, embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nascompile.compiler.errors import SpaceError
from nascompile.compiler.explore import call_arguments, tensors_in
from nascompile.compiler.profiler import CandidateProfile, ChoiceProfile, Profiler, Shape, count_parameters
from nascompile.compiler.space import unwrap


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters and FLOPs of a network; `batch` is the leading size of the first input tensor."""

    parameters: int
    flops: int
    batch: int | None = None

    @property
    def flops_per_sample(self) -> float | None:
        """FLOPs divided by the batch size; None when the inputs hold no batch."""
        return self.flops / self.batch if self.batch else None


def profile_choices(model: nn.Module, example_inputs: Any) -> dict[str, ChoiceProfile]:
    """The profile of every choice by its path, in registration order.

    From one run in eval mode in which every call of a LayerChoice runs every candidate (see `explore` for
    what is passed on and for the further runs that are made where one is not enough); the model is as before
    afterwards. A choice that no run reaches has no calls; a candidate that never ran has an `error`. Raises
    NascompileError when the model does not run.
    """
    return Profiler(model).run(example_inputs).profiles()


def check_weighted(profiles: Mapping[str, ChoiceProfile]) -> None:
    """Raise SpaceError unless the candidates of every LayerChoice return what can be weighted and added up.

    Choices with reduction "none" are left out, "concat" needs equal sizes except in dimension 1.
    """
    for profile in profiles.values():
        if profile.kind != "LayerChoice" or profile.reduction == "none":
            continue
        for call in range(len(profile.calls)):
            first: CandidateProfile | None = None
            for candidate in profile.candidates:
                shape = candidate.outputs[call]
                if shape is None:
                    continue
                if not _is_size(shape):
                    raise SpaceError(
                        f'choice "{profile.key}": candidate "{candidate.name}" returns {shape}, '
                        "expected one tensor: a weighted sum needs tensors"
                    )
                first = first or candidate
                other = first.outputs[call]
                if not _adds_up(other, shape, profile.reduction):
                    raise SpaceError(
                        f'choice "{profile.key}": candidate "{candidate.name}" returns {shape}, '
                        f'"{first.name}" returns {other}'
                    )


def count(
    model: nn.Module, example_inputs: Any, architecture: str | Path | Mapping[str, Any] | None = None
) -> Count:
    """Parameters (each once, however often it is shared) and FLOPs of one forward pass on the example inputs.

    Of a supernet without an architecture: everything in it, all candidates of all choices. With an
    architecture: of the network that `prune` makes of it. Of a module without choices: of the module. Raises
    NascompileError when the model does not run, ArchitectureError when the architecture does not fit.
    """
    model = unwrap(model)
    if architecture is not None:
        # prune imports the tracer; measuring needs neither
        from nascompile.compiler.prune import prune

        model = prune(model, architecture, example_inputs)
    flops = Profiler(model).run(example_inputs).flops()
    return Count(count_parameters(model), flops, batch_size(example_inputs))


def batch_size(example_inputs: Any) -> int | None:
    """The leading size of the first input tensor; None when there is no tensor or it has no dimension."""
    first = next(tensors_in(call_arguments(example_inputs)), None)
    return int(first.shape[0]) if first is not None and first.dim() > 0 else None


def _is_size(shape: Shape) -> bool:
    return isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)


def _adds_up(left: Shape, right: Shape, reduction: str) -> bool:
    if reduction == "concat":
        return len(left) == len(right) and left[:1] + left[2:] == right[:1] + right[2:]
    try:
        torch.broadcast_shapes(left, right)
    except RuntimeError:
        return False
    return True
