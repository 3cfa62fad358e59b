"""Gives every choice the fusion of its weighted combination."""

from __future__ import annotations

from torch import fx

from nascompile.compiler.lower import LoweredChoice
from nascompile.compiler.patterns import PATTERNS


def fuse_weighted_sums(gm: fx.GraphModule) -> int:
    """Set the first pattern that matches on every lowered choice; note in words why none does.

    Legal because each pattern computes the same sum, rounded once instead of after every operation; outputs
    that do not
    suit the kernel are combined as written at run time.
    """
    fused = 0
    for node in gm.graph.nodes:
        target = node.target
        if not isinstance(target, LoweredChoice) or target.pattern is not None:
            continue
        reasons = []
        for pattern in PATTERNS:
            reason = pattern.why_not(target.choice)
            if reason is None:
                target.pattern = pattern
                fused += 1
                break
            reasons.append(f"{pattern.name}: {reason}")
        else:
            gm.meta["notes"].setdefault(target.path, "; ".join(reasons))
    return fused
