"""Which values of a lowered graph may share memory because of choices: an identity that is chosen alone hands
on the very tensor that the choice got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from nascompile.compiler.candidates import Candidate, read_once
from nascompile.compiler.inplace import base_of, changed_values, is_in_place, is_view
from nascompile.compiler.lower import LoweredChoice, LoweredLayerChoice

# of which a change of the values says nothing
_QUESTIONS = ("shape", "dtype", "device", "ndim", "size", "dim", "numel")


class Aliases:
    """Follows memory through views, operations in place, and choices that may hand on what they get.

    `seen`: the nodes that an operation in place keeps as written, with the reason: it changes a value that
    was handed on by choices, and that is used afterwards or belongs to someone else. They are the operation
    and these choices.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._known: dict[Any, Candidate | str] = gm.meta.setdefault("candidates", {})
        self._handed_on: dict[fx.Node, list[fx.Node]] = {}
        self._order = {node: position for position, node in enumerate(gm.graph.nodes)}
        self._changed: dict[fx.Node, set[fx.Node]] = {}
        self.seen: dict[fx.Node, str] = {}
        for node in gm.graph.nodes:
            for value in changed_values(gm, node):
                self._look(node, value)

    def changed(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that made the memory which `node` changes in place, as far as that can be seen."""
        bases = {base_of(self._gm, value) for value in changed_values(self._gm, node)}
        return bases | self._changed.get(node, set())

    def _look(self, node: fx.Node, value: fx.Node) -> None:
        family = self._family(value, self._order[node])
        choices = [one for one in family if isinstance(one.target, LoweredChoice) and self._sources(one)]
        if not choices or not self._is_seen(node, value, family):
            return
        self._changed.setdefault(node, set()).update(base_of(self._gm, member) for member in family)
        self.seen.setdefault(node, f"{node.name} changes a value in place that a choice may have handed on")
        for choice in choices:
            self.seen.setdefault(choice, f"it may hand on its input, and {node.name} changes that in place")

    def _is_seen(self, node: fx.Node, value: fx.Node, family: Iterable[fx.Node]) -> bool:
        here = self._order[node]

        def reads_later(user: fx.Node) -> bool:
            return self._order[user] > here and not _asks_about(user)

        return any(
            member.op in ("placeholder", "get_attr")
            or (member is not value and any(map(reads_later, member.users)))
            for member in family
        )

    def _family(self, value: fx.Node, before: int) -> set[fx.Node]:
        """What may share memory with `value` when the node at `before` runs."""
        family, frontier = {value}, [value]
        while frontier:
            member = frontier.pop()
            heirs = [user for user in member.users if self._order[user] < before]
            related = [user for user in heirs if member in self._sources(user)] + self._sources(member)
            fresh = [other for other in dict.fromkeys(related) if other not in family]
            family.update(fresh)
            frontier += fresh
        return family

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that the node may hand on, or a view of them."""
        if node not in self._handed_on:
            self._handed_on[node] = self._find_sources(node)
        return self._handed_on[node]

    def _find_sources(self, node: fx.Node) -> list[fx.Node]:
        if isinstance(node.target, LoweredLayerChoice):
            return list(node.all_input_nodes) if self._may_hand_on(node.target) else []
        if isinstance(node.target, LoweredChoice):
            return list(node.all_input_nodes)
        if _asks_about(node):
            return []
        if is_view(self._gm, node) or is_in_place(self._gm, node):
            return [one for one in node.args[:1] if isinstance(one, fx.Node)]
        return []

    def _may_hand_on(self, target: LoweredLayerChoice) -> bool:
        choice: Any = target.choice
        for module in choice:
            if module is None:
                continue
            candidate = read_once(module, self._known)
            if isinstance(candidate, str) or candidate.returns_input:
                return True
            candidate.guard(module, self._gm.meta["guards"])
        return False


def _asks_about(node: fx.Node) -> bool:
    """Whether the node reads something of a tensor that is not its memory."""
    if node.op == "call_method":
        return node.target in _QUESTIONS
    return node.target is getattr and len(node.args) > 1 and node.args[1] in _QUESTIONS
