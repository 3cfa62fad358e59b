"""Strategies that draw random search spaces and decisions for them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st

from nascompile.compiler.space import all_choices, choices
from nascompile.mutables import InputChoice, LayerChoice
from tests.space_layers import LAYERS
from tests.space_models import ISLANDS, build
from tests.space_plans import (
    Again,
    Block,
    Cell,
    Choice,
    Dead,
    Island,
    Layer,
    Nested,
    Op,
    Plan,
    Residual,
    Scope,
    Skip,
    Twice,
)

INPUTS = ("one", "two", "given", "missing", "dict", "keyword")
OUTPUTS = ("tensor", "tuple", "dict")

# ----- decisions


def space(plan: Plan) -> dict[str, LayerChoice | InputChoice]:
    """The choices of a plan by key."""
    return choices(build(plan))


@st.composite
def masks(draw: Any, length: int, *, kinds: tuple[str, ...]) -> list[Any]:
    """A decision for one choice: "one" hot, "many" hot (perhaps none), or "weights" (perhaps zero)."""
    kind = draw(st.sampled_from(kinds))
    if kind == "one":
        chosen = draw(st.integers(0, length - 1))
        return [index == chosen for index in range(length)]
    if kind == "many":
        return draw(st.lists(st.booleans(), min_size=length, max_size=length))
    weight = st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.75])
    return draw(st.lists(weight, min_size=length, max_size=length))


KINDS = ("one", "one", "many", "weights")


@st.composite
def architectures(draw: Any, plan: Plan, kinds: tuple[str, ...] = KINDS) -> dict[str, list[Any]]:
    """A decision for every key of the plan's space. Where a list must not be empty, something is chosen."""
    found = {}
    for key, choice in space(plan).items():
        mask = draw(masks(len(choice), kinds=kinds))
        if not any(mask):
            mask = _filled(mask, _needs_one(plan))
        found[key] = mask
    return found


def _needs_one(plan: Plan) -> bool:
    return any(choice.reduction == "none" for choice in all_choices(build(plan)))


def _filled(mask: list[Any], needed: bool) -> list[Any]:
    # torch.stack of nothing is an error in every mode
    if not needed:
        return mask
    return [type(mask[0])(1), *mask[1:]]


# ----- strategies

_kinds = st.sampled_from(sorted(LAYERS))
_reductions = st.sampled_from(["sum", "sum", "mean", "concat", "none"])
_key_sizes = {"shared_two": 2, "shared_three": 3}


@st.composite
def layer_choices(draw: Any, depth: int = 1) -> Choice:
    """A LayerChoice with two to four candidates, one of them perhaps with a choice of its own."""
    key = draw(st.sampled_from([None, None, None, *_key_sizes]))
    length = _key_sizes[key] if key else draw(st.integers(1, 4))
    candidates: list[Any] = [draw(_kinds) for _ in range(length)]
    if depth and draw(st.integers(0, 4)) == 0:
        candidates[-1] = Nested(draw(_kinds), draw(layer_choices(depth=depth - 1)))
    return Choice(
        tuple(candidates), draw(st.booleans()), draw(_reductions), draw(st.integers(0, 4)) == 0, key
    )  # fmt: skip


def blocks(islands: bool = True) -> st.SearchStrategy[Block]:
    """One block of a network."""
    choice = layer_choices()
    inner: Any = st.one_of(st.builds(Op, choice), st.builds(Residual, choice, st.booleans()))
    n_chosen = st.sampled_from([None, 0, 1, 2])
    found: list[Any] = [
        st.builds(Layer, _kinds),
        st.builds(Op, choice),
        st.builds(Residual, choice, st.booleans()),
        st.builds(
            Skip,
            st.integers(1, 3),
            n_chosen,
            st.sampled_from(["sum", "mean", "concat"]),
            st.booleans(),
            st.booleans(),
        ),
        st.builds(
            Cell,
            st.lists(choice, min_size=2, max_size=3).map(tuple),
            st.sampled_from([None, 1, 2]), st.sampled_from(["sum", "mean", "concat", "none"]), st.booleans(),
        ),
        st.builds(Dead, choice),
        st.builds(Scope, st.sampled_from(["scope_a", "scope_b"]), inner),
        st.builds(Twice, inner),
        st.builds(Again, st.integers(0, 3)),
    ]  # fmt: skip
    if islands:
        found.append(st.builds(Island, st.sampled_from(sorted(ISLANDS)), inner))
    return st.one_of(found)


def plans(islands: bool = True) -> st.SearchStrategy[Plan]:
    """Search spaces of one to four blocks."""
    return st.builds(
        Plan,
        st.lists(blocks(islands), min_size=1, max_size=4).map(tuple),
        st.sampled_from(["net", "net", "net", "net", "sequential", "choice"]),
        st.sampled_from(INPUTS),
        st.sampled_from(OUTPUTS),
    )
