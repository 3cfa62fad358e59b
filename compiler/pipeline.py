"""The one order of passes, and the one runner. A pass is a function `(gm) -> number of rewrites`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch import fx

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.passes.drop_identity import drop_identity
from nascompile.compiler.passes.drop_unused import drop_unused
from nascompile.compiler.passes.functionalize_in_place import functionalize_in_place
from nascompile.compiler.passes.fuse_regions import fuse_regions
from nascompile.compiler.passes.fuse_weighted_sums import fuse_weighted_sums
from nascompile.compiler.passes.lower_choices import lower_choices
from nascompile.compiler.passes.share_prefixes import share_prefixes
from nascompile.compiler.region.rewrites import REWRITES
from nascompile.compiler.spec import check

log = logging.getLogger(__name__)
Pass = Callable[[fx.GraphModule], int]

# passes up to and including `lower_choices` see choices as modules, the others as functions
DEFAULT: tuple[Pass, ...] = (
    drop_identity,
    drop_unused,
    lower_choices,
    functionalize_in_place,
    fuse_regions,
    share_prefixes,
    fuse_weighted_sums,
)


def names(passes: Sequence[Pass] = DEFAULT) -> list[str]:
    """The names by which passes can be skipped."""
    return [one.__name__ for one in passes]


def run(gm: fx.GraphModule, passes: Sequence[Pass] = DEFAULT, *, skip: Sequence[str] = ()) -> dict[str, int]:
    """Run the passes in order on `gm`, in place; the answer is the number of rewrites of each.

    `skip` names passes, or rewrites inside plans (`region.rewrites`). After every pass the graph must be
    legal for its stage (`spec`). Raises NascompileError for an unknown name in `skip`.
    """
    known = [*names(passes), *REWRITES]
    unknown = [name for name in skip if name not in known]
    if unknown:
        raise NascompileError(f"there is no pass {unknown[0]!r}; passes: {', '.join(known)}")
    gm.meta["skip"] = tuple(skip)
    check(gm, "traced", "tracing")
    stage, rewrites = "traced", {}
    for one in passes:
        name = one.__name__
        if name in skip:
            continue
        before, start = len(gm.graph.nodes), time.perf_counter()
        rewrites[name] = one(gm)
        if one is lower_choices:
            stage = "lowered"
        check(gm, stage, name)
        log.debug(
            "%s: %d rewrites, nodes %d -> %d, %.1f ms",
            *(name, rewrites[name], before, len(gm.graph.nodes), 1e3 * (time.perf_counter() - start)),
        )
    return rewrites
