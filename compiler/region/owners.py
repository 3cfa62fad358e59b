"""Which candidates the operations of a plan serve: from the values they are part of to the decisions that ask
for these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nascompile.compiler.region.ir import Act, Sum, Value, Weight
from nascompile.compiler.region.plan import Direction, Plan


@dataclass(frozen=True, slots=True)
class Part:
    """One operation of a plan, and the candidates it serves; none where it runs whatever is chosen.

    `is_step`: it runs for every image, not once. `values`: what it, or its gradient, belongs to.
    """

    direction: str
    operation: Any
    is_step: bool
    values: tuple[Value, ...]
    owners: frozenset[Weight]

    @property
    def keys(self) -> frozenset[str]:
        """The choices that it serves."""
        return frozenset(owner.key for owner in self.owners)


def parts_of(plan: Plan) -> list[Part]:
    """All operations of a plan, forward and backward, in order."""
    found = direction_parts("forward", plan.forward)
    return found if plan.backward is None else [*found, *direction_parts("backward", plan.backward)]


def direction_parts(name: str, direction: Direction) -> list[Part]:
    """All operations of one program, in order."""
    operations = [
        (operation, is_step)
        for phase in direction.program.phases
        for is_step, group in ((False, phase.barriers), (True, phase.steps))
        for operation in group
    ]
    return [
        Part(name, operation, is_step, values, owners_of(values))
        for (operation, is_step), values in zip(operations, direction.serves, strict=True)
    ]


def owners_of(values: Sequence[Value]) -> frozenset[Weight]:
    """The candidates that ask for any of the values; of a sum those whose outputs it adds up."""
    return frozenset(Weight(owner.key, owner.index) for value in values for owner in _owners(value))


def _owners(value: Value) -> set[Weight]:
    own = set(value.owners or ())
    if isinstance(value.op, Act) and isinstance(value.inputs[0].op, Sum):
        return own | _of_merged(value.inputs[0])
    if not isinstance(value.op, Sum):
        return own
    for info, part in zip(value.op.terms, value.inputs, strict=True):
        own.update(info.needs)
        if info.weight is None:
            own |= _of_merged(part)
    return own


def _of_merged(part: Value) -> set[Weight]:
    """The candidates of a sum that its only reader adds up itself."""
    return _owners(part) if isinstance(part.op, Sum) and len(part.users) == 1 else set()
