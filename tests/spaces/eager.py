"""Drives a space eagerly in tests: random decisions, fixed ones, and what a decision uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nascompile.mutables import LayerChoice
from nascompile.mutator import Mutator


class RandomDecisions(Mutator):
    """Uniform one-hot layer choices; coin flips or a random subset for input choices."""

    def sample_search(self) -> dict[str, Any]:
        masks: dict[str, Any] = {}
        for key, choice in self.choices_by_key.items():
            size = len(choice)
            n_chosen = 1 if isinstance(choice, LayerChoice) else choice.n_chosen
            if n_chosen is None:
                masks[key] = torch.rand(size) < 0.5
            else:
                masks[key] = torch.zeros(size, dtype=torch.bool)
                masks[key][torch.randperm(size)[:n_chosen]] = True
        return masks

    sample_final = sample_search


def decide(model: nn.Module, chosen: dict[str, str | int | list[int]]) -> RandomDecisions:
    """Bind a mutator with the given decision: for every key a name, an index or a list of indices."""
    mutator = RandomDecisions(model)
    choices = mutator.choices_by_key
    assert set(chosen) == set(choices)
    masks: dict[str, Any] = {}
    for key, what in chosen.items():
        choice = choices[key]
        if isinstance(what, str):
            assert isinstance(choice, LayerChoice)
            what = choice.names.index(what)
        masks[key] = torch.zeros(len(choice), dtype=torch.bool)
        masks[key][what] = True
    mutator.decide(masks)
    return mutator


def used_parameters(model: nn.Module, *inputs: Tensor) -> int:
    """The number of parameters that the output of a bound model depends on under its current decision."""
    model.zero_grad(set_to_none=True)
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return sum(p.numel() for p in model.parameters() if p.grad is not None)
