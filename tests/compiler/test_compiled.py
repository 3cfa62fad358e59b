"""The contract of `compile`, sentence by sentence, on programs written by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.errors import TraceError
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from tests.comparing import Decided, assert_same, decision, step
from tests.compiler import programs
from tests.compiler.programs import ISLANDS, TRACED, conv, image

DECISIONS: tuple[list[Any], ...] = (
    [0.2, 0.5, 0.3],
    [True, False, False],
    [False, True, False],
    [0.0, 0.6, 0.4],
    [True, False, True],
    [0.0, 1.0, 0.0],
)


def build(program: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return program().double()


def decide(model: nn.Module, number: int) -> dict[str, Tensor]:
    """Bind a mutator that follows one of DECISIONS for every key."""
    mutator = next((m.bound_mutator for m in model.modules() if getattr(m, "bound_mutator", None)), None)
    mutator = Decided(model) if mutator is None else mutator
    masks = decision({key: DECISIONS[number][: len(c)] for key, c in mutator.choices_by_key.items()})
    if not all(bool(mask.detach().any()) for mask in masks.values()):
        masks = {key: torch.ones(len(mask), dtype=torch.bool) for key, mask in masks.items()}
    mutator.decide(masks)
    return masks


def assert_equal_steps(eager: nn.Module, compiled: nn.Module, numbers: Any = range(6)) -> None:
    """Same steps in training and evaluation under several decisions."""
    for number in numbers:
        for mode in (True, False):
            results = []
            for model in (eager, compiled):
                model.train(mode)
                masks = decide(model, number)
                random.seed(number)
                numpy.random.seed(number)
                torch.manual_seed(number)
                results.append(step(model, masks, type(eager).args(), type(eager).kwargs(), seed=number))
            assert_same(results[1], results[0])


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("program", [*TRACED, *(program for program, _ in ISLANDS)], ids=lambda p: p.__name__)
def test_equals_eager(program: Any, example: bool) -> None:
    eager, model = build(program), build(program)
    example = example and not program.kwargs()
    compiled = nascompile.compile(model, program.args() if example else None)
    assert_equal_steps(eager, compiled)
    if program in TRACED:
        assert not compiled.islands
    if program is programs.SideEffects:
        assert model.op[0].seen == eager.op[0].seen  # type: ignore[union-attr]


@pytest.mark.parametrize(("program", "reason"), ISLANDS, ids=lambda p: getattr(p, "__name__", ""))
def test_islands_name_file_line_and_reason(program: Any, reason: str) -> None:
    compiled = nascompile.compile(build(program), program.args())
    (island,) = compiled.islands
    assert island.path == ("inner" if program is programs.Nested else "")
    assert reason in island.reason
    assert island.file == programs.__file__
    lines = Path(programs.__file__).read_text().splitlines()
    marked = [
        number for number, line in enumerate(lines, 1) if line.endswith(f"# island: {program.__name__}")
    ]
    if marked:
        assert [island.line] == marked
    assert str(island).endswith(f"({island.file}:{island.line})")
    with pytest.raises(TraceError, match='require="traced" cannot be honoured'):
        nascompile.compile(build(program), program.args(), require="traced")
