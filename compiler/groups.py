"""Finds the candidates of a choice that are computed together, and says at run time whether they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nascompile.compiler.candidates import Candidate, read_once, structure
from nascompile.compiler.chains import Member, Reader, links
from nascompile.compiler.checks import has_hooks
from nascompile.compiler.guards import Guards
from nascompile.compiler.mutables import LayerChoice
from nascompile.compiler.patterns import GROUPS, GroupPattern


@dataclass(frozen=True, slots=True)
class Group:
    """Candidates of one choice that a pattern computes together, ascending."""

    pattern: GroupPattern
    members: tuple[Member, ...]

    def chosen(self, indices: Sequence[int]) -> list[Member]:
        """Those of its candidates that take part."""
        return [member for member in self.members if member.index in indices]

    def suited(self, x: object, members: list[Member]) -> list[Member]:
        """Those that go together for `x`: all, those that are not the identity, or none."""
        if self.why_not_now(x, members) is None:
            return members
        affine = [member for member in members if member.layers]
        fewer = 1 < len(affine) < len(members)
        return affine if fewer and self.why_not_now(x, affine) is None else []

    def why_not_now(self, x: object, members: Sequence[Member]) -> str | None:
        """Why these candidates have to run one by one on `x`, or None."""
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            return "the input is no dense tensor"
        if nn.modules.module._has_any_global_hook():
            return "hooks on all modules are active"
        affines = [affine for member in members for affine in member.affines]
        for affine in affines:
            reason = affine.why_not_now(x)
            if reason is not None:
                return reason
        if len({affine.layer.weight.dtype for affine in affines}) > 1:
            return "the parameters differ in type"
        return self.pattern.why_not_now(x, members)


def find_groups(
    choice: LayerChoice,
    prefixes: Sequence[fx.Node | None],
    guards: Guards,
    known: dict[Any, Any],
) -> tuple[tuple[Group, ...], str | None]:
    """The groups of a choice with a weighted sum, and in words why a candidate that looks like it is in none.

    prefixes: the shared value that each candidate starts from. What is taken for granted, also for finding
    nothing in this mode, becomes a guard. `known` keeps what has been read.
    """
    present = [index for index, module in enumerate(choice) if module is not None]
    readers: dict[int, Reader] = {}
    for index in present:
        reader = _reader(choice[index], prefixes[index] is not None, known)
        if reader is not None and reader.problem is None:
            readers[index] = reader
    if len(readers) < 2 or not any(reader.layers for reader in readers.values()):
        return (), None
    reason = _why_not_together(choice, known)
    obstacles = [
        f"candidate {choice.names[index]!r} {reader.obstacle}"
        for index, reader in readers.items()
        if reader.obstacle is not None
    ]
    if reason is not None:
        return (), f"candidates not merged: {reason}"
    for reader in readers.values():
        reader.guard(guards)
    found = [reader.member(index, prefixes[index]) for index, reader in readers.items()]
    groups = _groups([member for member in found if member is not None])
    if groups:
        # nobody else may begin to change what the group reads
        for index in present:
            candidate = read_once(choice[index], known)
            assert isinstance(candidate, Candidate)
            candidate.guard(choice[index], guards)
    return groups, f"not merged: {'; '.join(obstacles)}" if obstacles else None


def _reader(module: nn.Module, has_prefix: bool, known: dict[Any, Any]) -> Reader | None:
    nodes = links(module, known, ("links", structure(module)))
    candidate = read_once(module, known)
    if nodes is None or isinstance(candidate, str):
        return None
    return Reader(module, nodes[len(candidate.prefix) if has_prefix else 0 :])


def _groups(members: Sequence[Member]) -> tuple[Group, ...]:
    groups: list[Group] = []
    for pattern in GROUPS:
        taken = {member.index for group in groups for member in group.members}
        free = [member for member in members if member.index not in taken]
        groups += [Group(pattern, found) for found in pattern.groups(free)]
    return tuple(groups)


def _why_not_together(choice: LayerChoice, known: dict[Any, Any]) -> str | None:
    """Why the candidates must run in their order, because one may change the input of the next, or None."""
    for name, module in zip(choice.names, choice, strict=True):
        if module is None:
            continue
        candidate = read_once(module, known)
        if isinstance(candidate, str):
            return f"candidate {name!r} {candidate}"
        if any(has_hooks(child) for child in module.modules()):
            return f"candidate {name!r} has hooks, which may change the input of others"
    return None
