"""How large a search space is: how many architectures, and how small and large the networks can be."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

from torch import nn

from nascompile.compiler.measure import Count
from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.profiler import ChoiceProfile
from nascompile.compiler.space import Choice, choices


def count_architectures(model: nn.Module) -> int:
    """The number of different decisions: the product over all keys, nested choices included."""
    return math.prod(_options(choice) for choice in choices(model).values())


def _options(choice: Choice) -> int:
    if isinstance(choice, LayerChoice):
        return sum(1 for candidate in choice if candidate is not None)
    return 2 ** len(choice) if choice.n_chosen is None else math.comb(len(choice), choice.n_chosen)


def extreme_size(
    model: nn.Module,
    profiles: Mapping[str, ChoiceProfile],
    outside_flops: int,
    pick: Callable[..., int],
    batch: int | None = None,
) -> Count:
    """The network when every LayerChoice takes its smallest (`pick=min`) or largest (`pick=max`) candidate.

    By parameters, then FLOPs; every input of every InputChoice stays, so that the smallest network may be
    smaller still. `profiles` are those of `profile_choices`, `outside_flops` the FLOPs outside of all
    choices.
    """
    paths = {id(model.get_submodule(path)): path for path in profiles}
    by_key: dict[str, list[str]] = defaultdict(list)
    for path, profile in profiles.items():
        if profile.kind == "LayerChoice":
            by_key[profile.key].append(path)
    taken: dict[str, int] = {}
    # inner choices first: what they take is part of what their candidate costs
    for key in sorted(by_key, key=lambda key: -max(_depth(profiles, path) for path in by_key[key])):
        usable = [
            i
            for i, candidate in enumerate(profiles[by_key[key][0]].candidates)
            if candidate.error != "is None"
        ]

        def cost(index: int, members: list[str] = by_key[key]) -> tuple[int, int]:
            layers = [model.get_submodule(path) for path in members]
            parameters = sum(
                _parameters(_candidate(layer, index), paths, profiles, taken) for layer in layers
            )
            return parameters, sum(profiles[path].candidates[index].flops for path in members)

        if usable:
            taken[key] = pick(usable, key=cost)
    flops = outside_flops
    for path, profile in profiles.items():
        if profile.kind == "LayerChoice" and profile.key in taken and _is_active(path, profiles, taken):
            flops += profile.candidates[taken[profile.key]].own_flops
    return Count(_parameters(model, paths, profiles, taken), flops, batch)


def _candidate(layer: nn.Module, index: int) -> nn.Module | None:
    assert isinstance(layer, LayerChoice)
    return layer[index]


def _depth(profiles: Mapping[str, ChoiceProfile], path: str) -> int:
    inside = profiles[path].inside
    return 0 if inside is None else 1 + _depth(profiles, inside[0])


def _is_active(path: str, profiles: Mapping[str, ChoiceProfile], taken: Mapping[str, int]) -> bool:
    inside = profiles[path].inside
    if inside is None:
        return True
    outer = profiles[inside[0]]
    chosen = outer.candidates[taken[outer.key]].name
    return chosen == inside[1] and _is_active(inside[0], profiles, taken)


def _parameters(
    module: nn.Module | None,
    paths: Mapping[int, str],
    profiles: Mapping[str, ChoiceProfile],
    taken: Mapping[str, int],
) -> int:
    """Scalars in the parameters below `module`, each once; of a choice, only below what it takes."""
    found: dict[int, int] = {}

    def visit(module: nn.Module | None) -> None:
        if module is None or isinstance(module, InputChoice):
            return
        found.update(
            (id(parameter), parameter.numel())
            for parameter in module._parameters.values()
            if parameter is not None
        )
        path = paths.get(id(module))
        if path is not None and profiles[path].key in taken:
            visit(_candidate(module, taken[profiles[path].key]))
            return
        for child in module._modules.values():
            visit(child)

    visit(module)
    return sum(found.values())
