"""One choice and the same step through the program and through its compiled form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler import pipeline
from nascompile.compiler.lower import LoweredLayerChoice
from nascompile.mutables import LayerChoice
from tests.comparing import Decided, assert_close, step

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


class OneChoice(nn.Module):
    """Applies its choice, and nothing else."""

    def __init__(self, candidates: list[Any], reduction: str = "sum") -> None:
        super().__init__()
        self.op = LayerChoice(candidates, reduction, key="op")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def compiled(
    candidates: list[Any], x: Tensor, *, reduction: str = "sum", training: bool = True
) -> tuple[nn.Module, Any]:
    """The program and, of a copy of it, the compiled form."""
    eager = OneChoice(candidates, reduction).to(x.dtype).train(training)
    # regions take whole choices before groups are looked for
    skip = [name for name in pipeline.names() if name == "fuse_regions"]
    return eager, nascompile.compile(copy.deepcopy(eager), x, skip=skip)


def found(model: Any) -> list[tuple[str, list[int]]]:
    """The groups of the last trace: the pattern, and the candidates."""
    target = model.entries[-1].lowered[0]
    assert isinstance(target, LoweredLayerChoice)
    return [(group.pattern.name, [member.index for member in group.members]) for group in target.groups]


def steps(
    eager: nn.Module, model: nn.Module, x: Tensor, weights: list[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The step of the program, and of its compiled form."""
    results = []
    for one in (eager, model):
        floating = isinstance(weights[0], float)
        mask = torch.tensor(weights, dtype=torch.float64 if floating else None, requires_grad=floating)
        choice: Any = one.get_submodule("op")
        mutator = choice.bound_mutator or Decided(one)
        mutator.decide({"op": mask})
        results.append(step(one, {"op": mask}, (x,), {}))
    return results[0], results[1]


def assert_equal(
    eager: nn.Module, model: nn.Module, x: Tensor, weights: list[Any], **tolerance: Any
) -> dict[str, Any]:
    """Outputs, all gradients (None where there is none) and buffers agree; gives those of the compiled
    form."""
    expected, actual = steps(eager, model, x, weights)
    assert_close(actual, expected, **(tolerance or TOLERANCE))
    return actual


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Reproducible numbers that want a gradient."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()
