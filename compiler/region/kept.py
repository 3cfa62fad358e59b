"""Which parameters a backward pass depends on: those that autograd keeps for it in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TypeVar

from nascompile.compiler.region.copies import refs_of
from nascompile.compiler.region.ir import Conv, Graph, Norm, TensorRef, Weight
from nascompile.compiler.region.types import is_computed

T = TypeVar("T")
"""A parameter, or the reference to it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Marks of a region's parameters under a decision, in their order.

    reached: what gradients arrive at; autograd knows no others. factors: weights of convolutions and
    normalisations that gradients pass; backward needs their values. others: biases, and what leads to no
    gradient; only who runs forward again needs their values.
    """

    reached: tuple[bool, ...]
    factors: tuple[bool, ...]
    others: tuple[bool, ...]

    def reached_of(self, parameters: Sequence[T]) -> list[T]:
        """Those of the parameters that gradients arrive at."""
        return list(compress(parameters, self.reached))

    def factors_of(self, parameters: Sequence[T]) -> list[T]:
        """The factors among the parameters, or among the references to them."""
        return list(compress(parameters, self.factors))

    def others_of(self, parameters: Sequence[T]) -> list[T]:
        """The others, likewise."""
        return list(compress(parameters, self.others))


def kept(
    graph: Graph,
    parameters: Sequence[TensorRef],
    chosen: frozenset[Weight],
    is_reached: Callable[[TensorRef], bool] | None,
) -> Kept:
    """What a decision makes of the parameters of a region, given what backward leads to; None where no
    parameter wants a gradient."""
    ops = [value.op for value in graph.values if is_computed(value, chosen)]
    norms = [op for op in ops if isinstance(op, Norm) and not op.is_fixed]
    factors = {op.weight for op in ops if isinstance(op, Conv)} | {op.gamma for op in norms}
    factors = {ref for ref in factors if ref is not None and (is_reached is None or is_reached(ref))}
    read = {ref for op in ops for ref in refs_of(op)}
    return Kept(
        tuple(is_reached is not None and is_reached(ref) for ref in parameters),
        tuple(ref in factors for ref in parameters),
        tuple(ref in read and ref not in factors for ref in parameters),
    )
