"""Run-time flags: which steps and terms of a plan take part under a decision. The plan itself stays."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from nascompile.compiler.region.ir import Weight
from nascompile.kernels.plan.steps import NONE

ALWAYS = NONE
NEVER = -2
"""Not a flag of a plan: says that something is never needed."""


WITH_PARAMETERS = Weight("gradients of parameters", 1)
WITHOUT_PARAMETERS = Weight("gradients of parameters", 0)
"""Chosen, one of the two, by each backward run: whether anyone asks for the gradients of the parameters."""


def gradient_of_output(index: int) -> Weight:
    """Chosen by each backward run for the outputs that have a gradient."""
    return Weight("gradients of outputs", index)


class Flags:
    """Flags by number: a chosen candidate, or "all of" and "any of" earlier flags."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, Weight | tuple[int, ...]]] = []
        self._known: dict[tuple[str, Weight | tuple[int, ...]], int] = {}

    def chosen(self, weight: Weight) -> int:
        """Holds while the decision chooses the candidate."""
        return self._number("chosen", weight)

    def all_of(self, flags: Iterable[int]) -> int:
        """Holds while all of them hold."""
        parts = set(flags) - {ALWAYS}
        if NEVER in parts:
            return NEVER
        if len(parts) < 2:
            return next(iter(parts), ALWAYS)
        return self._number("all", tuple(sorted(parts)))

    def any_of(self, flags: Iterable[int]) -> int:
        """Holds while one of them holds."""
        parts = set(flags) - {NEVER}
        if ALWAYS in parts:
            return ALWAYS
        if len(parts) < 2:
            return next(iter(parts), NEVER)
        return self._number("any", tuple(sorted(parts)))

    def _number(self, kind: str, what: Weight | tuple[int, ...]) -> int:
        row = (kind, what)
        if row not in self._known:
            self._known[row] = len(self._rows)
            self._rows.append(row)
        return self._known[row]

    def evaluate(self, chosen: Collection[Weight]) -> list[bool]:
        """All flags under a decision."""
        values: list[bool] = []
        for kind, what in self._rows:
            if kind == "chosen":
                values.append(what in chosen)
            elif kind == "all":
                values.append(all(values[index] for index in what))  # type: ignore[index,union-attr]
            else:
                values.append(any(values[index] for index in what))  # type: ignore[index,union-attr]
        return values


def as_tensor(values: list[bool]) -> Tensor:
    """The flags as the executor wants them; at least one, for an empty tensor has no address."""
    return torch.tensor([*values, False], dtype=torch.uint8)
