"""What became of the candidates of a choice in the plans, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nascompile.compiler.mutables import InputChoice
from nascompile.compiler.region.ir import Act, Conv, Norm, Sum, Value, Weight, Zero
from nascompile.compiler.region.owners import Part
from nascompile.compiler.space import Choice
from nascompile.kernels.plan.steps import Combine, Convolve, Gate, Load, Pick, Pool, Stage, Store

MOST_NAMES = 3
"""Of choices that share something; the others are counted."""


def fates(choice: Choice, parts: Sequence[Part], values: Sequence[Value], places: int) -> list[str]:
    """For every candidate, what computes it: the forward steps of one place, and what is done inside of them.

    parts: those that serve the choice. values: all of the plans. places: how often the choice is called.
    """
    if isinstance(choice, InputChoice):
        return ["a term of the sum"] * len(choice)
    return [
        _fate(Weight(choice.key, index), choice[index], parts, values, places) for index in range(len(choice))
    ]


def shared(key: str, parts: Sequence[Part]) -> list[str]:
    """What the choice shares with others, and with which."""
    found: dict[str, set[str]] = {}
    for part in parts:
        others = part.keys - {key}
        is_work = part.is_step and not isinstance(part.operation, Load | Store)
        if part.direction == "forward" and is_work and others:
            found.setdefault(_kind_of_shared(part), set()).update(others)
    by_others: dict[str, list[str]] = {}
    for kind, others in found.items():
        by_others.setdefault(_names(others), []).append(kind)
    return [f"{', '.join(kinds)} with {others}" for others, kinds in by_others.items()]


def _fate(owner: Weight, module: Any, parts: Sequence[Part], values: Sequence[Value], places: int) -> str:
    if module is None:
        return "is None"
    own = [value for value in values if value.owners is not None and owner in value.owners]
    if not own:
        return "a term of the sum" if isinstance(module, nn.Identity) else "done with what others need"
    if all(isinstance(value.op, Zero) for value in own):
        return "dropped: zeros"
    steps = [
        part
        for part in parts
        if owner in part.owners and part.direction == "forward" and part.is_step and _kind(part) is not None
    ]
    # in the order of the program, so that equal candidates have equal words
    steps.sort(key=lambda part: part.values[0].number)
    own.sort(key=lambda value: value.number)
    stored = {id(value) for part in steps for value in part.values}
    computed = Counter(str(_kind(part)) for part in steps)
    inside = Counter(_inside(value) for value in own if id(value) not in stored)
    del inside[""]
    said = _counted(computed, places) or ["a term of the sum"]
    return ", ".join(said) + (f" ({', '.join(_counted(inside, places))} inside)" if inside else "")


def _counted(kinds: Counter[str], places: int) -> list[str]:
    """Numbers for one place where all places are alike, a single one without."""
    is_alike = all(count % places == 0 for count in kinds.values())
    each = {kind: count // places if is_alike else count for kind, count in kinds.items()}
    words = [kind if count == 1 else f"{count} {kind}" for kind, count in each.items()]
    return words if is_alike else [*words[:-1], f"{words[-1]} in all places"]


def _kind(part: Part) -> str | None:
    """What a step computes; None for those that only serve others, and for sums over candidates."""
    operation, value = part.operation, part.values[0]
    if isinstance(operation, Convolve):
        if operation.depthwise_taps:
            return "depthwise+pointwise" if operation.taps else "depthwise"
        return _convolution(value)
    if isinstance(operation, Pool):
        return "max pool" if operation.is_max else "average pool"
    if isinstance(operation, Combine):
        return None if isinstance(value.op, Sum) else _inside(value) or type(value.op).__name__.lower()
    if isinstance(operation, Gate):
        return "gate"
    return "channel copy" if isinstance(operation, Pick) else None


def _convolution(value: Value) -> str:
    assert isinstance(value.op, Conv)
    kernel = "x".join(map(str, value.op.kernel))
    return "pointwise" if value.op.is_pointwise else f"{kernel} convolution"


def _inside(value: Value) -> str:
    """What is applied where a value is read or written, and has no step of its own."""
    if isinstance(value.op, Norm):
        if value.op.is_fixed:
            return "scaling"
        if value.op.beta is None and value.op.running_mean is None and not value.op.by_batch:
            return "slope"
        return "BatchNorm" if value.op.by_batch or value.op.running_mean is not None else "bias"
    return value.op.kind.name if isinstance(value.op, Act) else ""


def _kind_of_shared(part: Part) -> str:
    kind = _kind(part)
    if kind is not None:
        return kind
    if isinstance(part.operation, Stage):
        activation = part.operation.activation.name
        return "padding" if activation == "none" else f"{activation} and padding"
    return "sum" if isinstance(part.operation, Combine) else type(part.operation).__name__.lower()


def _names(keys: Iterable[str]) -> str:
    known = sorted(keys)
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return ", ".join(known[:MOST_NAMES]) + more
