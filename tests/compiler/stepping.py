"""Drives a program of `programs` and its compiled form through the same decisions."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tests.comparing import Decided, assert_same, decision, step

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
    mutator: Any = next((m.bound_mutator for m in model.modules() if getattr(m, "bound_mutator", None)), None)
    mutator = Decided(model) if mutator is None else mutator
    masks = decision({key: DECISIONS[number][: len(c)] for key, c in mutator.choices_by_key.items()})
    if not all(bool(mask.detach().any()) for mask in masks.values()):
        masks = {key: torch.ones(len(mask), dtype=torch.bool) for key, mask in masks.items()}
    mutator.decide(masks)
    return masks


def assert_equal_steps(eager: Any, compiled: nn.Module, numbers: Any = range(6)) -> None:
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
