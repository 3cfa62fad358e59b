"""Uniform random decisions, drawn from torch's random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.mutator import Mutator


class RandomMutator(Mutator):
    """Decides uniformly: one layer of each LayerChoice, a subset of each InputChoice.

    An InputChoice with `n_chosen` takes each subset of that size with equal probability; with `n_chosen=None`
    every input is taken or left by a fair coin, so none at all is possible. `keep(masks)` fixes what
    `sample_final()` and `export()` give; until then they give a fresh sample.
    """

    _final: dict[str, Tensor] | None = None

    def sample_search(self) -> dict[str, Any]:
        """A fresh uniform decision: a boolean CPU tensor for every key."""
        return {key: _draw(choice) for key, choice in self.choices_by_key.items()}

    def sample_final(self) -> dict[str, Any]:
        """The architecture given to `keep`, or a fresh uniform one."""
        return self.sample_search() if self._final is None else dict(self._final)

    def keep(self, masks: dict[str, Tensor] | None) -> None:
        """Make `masks` the final architecture; None goes back to sampling."""
        self._final = masks


def _draw(choice: LayerChoice | InputChoice) -> Tensor:
    length = len(choice)
    if isinstance(choice, InputChoice) and choice.n_chosen is None:
        return torch.randint(high=2, size=(length,)).bool()
    count = choice.n_chosen if isinstance(choice, InputChoice) else min(1, length)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[torch.randperm(length)[:count]] = True
    return mask
