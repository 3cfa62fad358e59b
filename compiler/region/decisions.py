"""The decisions of a region's choices, read once a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.decision import Selection
from nascompile.compiler.lower import LoweredChoice, decides_by_masks
from nascompile.compiler.mutables import LayerChoice
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.region.ir import Weight


@dataclass(frozen=True, slots=True)
class Decisions:
    """selections: by key. is_weighted: for every choice. chosen: the candidates that take part.

    vectors: by key and whether it is for means, in order, the weights of all candidates; those for means are
    divided by the number chosen.
    """

    selections: dict[str, Selection]
    is_weighted: tuple[bool, ...]
    chosen: frozenset[Weight]
    vectors: dict[tuple[str, bool], Tensor]


class Decided(Mutator):
    """Carries out given selections, without being bound to a model."""

    def __init__(self, selections: Mapping[str, Selection]) -> None:
        nn.Module.__init__(self)
        self.given = selections

    def selection(self, key: str, length: int) -> tuple[Selection, Any]:
        """The selection that was given, and a mask that says the same."""
        selection = self.given[key]
        mask = [index in selection.indices for index in range(length)]
        return selection, mask if selection.weights is None else selection.weights


def read_decisions(
    choices: Sequence[LoweredChoice], dtype: torch.dtype, device: torch.device
) -> Decisions | str:
    """The current decisions, their weights in this type and on this device; a string says why choices cannot
    be carried out from masks alone."""
    selections: dict[str, Selection] = {}
    lengths: dict[str, int] = {}
    for target in choices:
        choice = target.choice
        key, length, mutator = choice.key, len(choice), choice.require_mutator()
        is_layer = isinstance(choice, LayerChoice)
        method = "on_forward_layer_choice" if is_layer else "on_forward_input_choice"
        if not decides_by_masks(mutator, method) or not isinstance(mutator, Mutator):
            return f"{type(mutator).__name__} carries out choices in its own way"
        if key not in selections:
            selections[key], lengths[key] = mutator.selection(key, length)[0], length
        elif length != lengths[key]:
            return f"choices of the key {key!r} differ in length"
        indices = selections[key].indices
        if not indices:
            return f"the decision chooses nothing for {key!r}"
        # few choices have such candidates, and most steps look at thousands
        if is_layer and None in choice._modules.values() and any(choice[index] is None for index in indices):
            return f"a candidate of {key!r} that is None is chosen"
    weighted = tuple(selections[t.choice.key].weights is not None for t in choices)
    chosen = frozenset(Weight(key, index) for key, s in selections.items() for index in s.indices)
    return Decisions(selections, weighted, chosen, _vectors(choices, selections, dtype, device))


def choice_length(choices: Sequence[LoweredChoice], key: str) -> int:
    """The number of candidates of the first choice with that key."""
    return next(len(target.choice) for target in choices if target.choice.key == key)


def _vectors(
    choices: Sequence[LoweredChoice],
    selections: Mapping[str, Selection],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[tuple[str, bool], Tensor]:
    vectors: dict[tuple[str, bool], Tensor] = {}
    for target in choices:
        key, selection = target.choice.key, selections[target.choice.key]
        is_mean = target.choice.reduction == "mean"
        if (key, is_mean) in vectors:
            continue
        weights = selection.weights
        if weights is None and is_mean:
            weights = torch.ones(len(target.choice), dtype=dtype, device=device)
        if weights is not None:
            weights = weights.to(device=device, dtype=dtype)
            vectors[key, is_mean] = weights / len(selection.indices) if is_mean else weights
    return vectors
