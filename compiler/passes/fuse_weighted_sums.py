"""Gives every choice the fusions of its weighted combination: of the sum, and of candidates that are computed
together."""

from __future__ import annotations

from typing import Any

from torch import fx

from nascompile.compiler.candidates import Candidate, why_order_matters
from nascompile.compiler.groups import find_groups
from nascompile.compiler.lower import LoweredChoice, LoweredLayerChoice
from nascompile.compiler.mutables import LayerChoice
from nascompile.compiler.patterns import PATTERNS, Pattern
from nascompile.compiler.space import Choice


def fuse_weighted_sums(gm: fx.GraphModule) -> int:
    """Set the first pattern that matches on every lowered choice, and the groups of its candidates; note in
    words why none does.

    Legal because each pattern computes the same sum, rounded once instead of after every operation; outputs
    that do not suit the kernel are combined as written at run time. Not done where a candidate may change
    what an earlier one returned: the program weighs each output before the next candidate runs. A group
    computes a part of the same sum by the distributive law, where no candidate changes the common input.
    """
    known: dict[Any, Candidate | str] = gm.meta.setdefault("candidates", {})
    fused = 0
    for node in gm.graph.nodes:
        target = node.target
        if not isinstance(target, LoweredChoice) or target.pattern is not None:
            continue
        target.pattern, reason = first_pattern(target.choice, known)
        fused += target.pattern is not None
        if target.pattern is not None and isinstance(target, LoweredLayerChoice) and _has_one_input(node):
            prefixes: Any = node.args[0]
            target.groups, reason = find_groups(target.choice, prefixes, gm.meta["guards"], known)  # type: ignore[arg-type]
        if reason is not None:
            notes = gm.meta["notes"]
            notes[target.path] = "; ".join(filter(None, (notes.get(target.path), reason)))
    return fused


def _has_one_input(node: fx.Node) -> bool:
    return len(node.args) == 2 and not node.kwargs


def first_pattern(choice: Choice, known: dict[Any, Candidate | str]) -> tuple[Pattern | None, str | None]:
    """The first pattern that matches, or in words why none does; `known` keeps candidates already read."""
    reasons = []
    for pattern in PATTERNS:
        reason = pattern.why_not(choice)
        if reason is None and isinstance(choice, LayerChoice):
            reason = why_order_matters(choice, known)
        if reason is None:
            return pattern, None
        reasons.append(f"{pattern.name}: {reason}")
    return None, "; ".join(reasons)
