"""Reads the search space out of a model: keys, the tree of mutables, and the checks that make it
consistent."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nascompile.compiler.errors import SpaceError
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable, MutableScope

Choice = LayerChoice | InputChoice


class StructuredMutableTreeNode:
    """A mutable and those nested in it; the root holds no mutable. Iterating visits each key once, parents
    first."""

    def __init__(self, mutable: Mutable | None) -> None:
        self.mutable = mutable
        self.children: list[StructuredMutableTreeNode] = []

    def add_child(self, mutable: Mutable) -> StructuredMutableTreeNode:
        """Append a child for `mutable` and return it."""
        self.children.append(StructuredMutableTreeNode(mutable))
        return self.children[-1]

    def type(self) -> type:
        """The class of the mutable (NoneType at the root)."""
        return type(self.mutable)

    def __iter__(self) -> Iterator[Mutable]:
        return self.traverse()

    def traverse(
        self, order: str = "pre", deduplicate: bool = True, memo: set[str] | None = None
    ) -> Iterator[Mutable]:
        """Visit in "pre" or "post" order; with `deduplicate`, only the first mutable of each key."""
        if order not in ("pre", "post"):
            raise ValueError(f'order is {order!r}, expected "pre" or "post"')
        memo = set() if memo is None else memo
        if order == "pre":
            yield from self._own(deduplicate, memo)
        for child in self.children:
            yield from child.traverse(order, deduplicate, memo)
        if order == "post":
            yield from self._own(deduplicate, memo)

    def _own(self, deduplicate: bool, memo: set[str]) -> Iterator[Mutable]:
        if self.mutable is None or (deduplicate and self.mutable.key in memo):
            return
        memo.add(self.mutable.key)
        yield self.mutable


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside a compiled model."""
    held = model.__dict__.get("_eager")
    return held if isinstance(held, nn.Module) else model


def read_space(model: nn.Module) -> StructuredMutableTreeNode:
    """The tree of all mutables of `model` in registration order, with their names and keys set.

    Raises SpaceError when mutables that share a key differ in their number of candidates, or `choose_from`
    names a key that does not come earlier.
    """
    root = StructuredMutableTreeNode(None)
    paths: dict[int, StructuredMutableTreeNode] = {}
    _collect(unwrap(model), "", root, paths)
    _assign_keys(list(root.traverse(deduplicate=False)))
    _check(list(root.traverse(deduplicate=False)))
    return root


def choices(model: nn.Module) -> dict[str, Choice]:
    """The first choice of every key, in registration order; scopes are left out."""
    return {m.key: m for m in read_space(model) if isinstance(m, LayerChoice | InputChoice)}


def all_choices(model: nn.Module) -> list[Choice]:
    """Every choice of the model, also those that share a key, in registration order."""
    tree = read_space(model).traverse(deduplicate=False)
    return [m for m in tree if isinstance(m, LayerChoice | InputChoice)]


def candidate_names(choice: Choice) -> list[str]:
    """The names of the candidates: of the layers, or of the inputs (their index where there is no source
    key)."""
    if isinstance(choice, LayerChoice):
        return list(choice.names)
    return [source or str(index) for index, source in enumerate(choice.choose_from)]


def _collect(
    module: nn.Module, path: str, node: StructuredMutableTreeNode, seen: dict[int, StructuredMutableTreeNode]
) -> None:
    if id(module) in seen:
        return
    if isinstance(module, Mutable):
        module._name = path
        node = node.add_child(module)
    seen[id(module)] = node
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{path}.{name}" if path else name, node, seen)


def _assign_keys(mutables: list[Mutable]) -> None:
    taken = {m.key for m in mutables if m._has_own_key}
    automatic: dict[str, str] = {}
    number = 0
    for mutable in mutables:
        if mutable._has_own_key:
            continue
        placeholder = str(mutable._placeholder)
        # copies made by deepcopy share the placeholder, not the decision
        number += 1
        while f"{type(mutable).__name__}{number}" in taken:
            number += 1
        if mutable.bound_mutator is None:
            mutable._key = f"{type(mutable).__name__}{number}"
        automatic.setdefault(placeholder, mutable.key)
    for mutable in mutables:
        if isinstance(mutable, InputChoice):
            mutable.choose_from = [automatic.get(source, source) for source in mutable._given_sources]


def _check(mutables: list[Mutable]) -> None:
    first: dict[str, Choice] = {}
    known = {InputChoice.NO_KEY}
    for mutable in mutables:
        known.add(mutable.key)
        if isinstance(mutable, MutableScope) or not isinstance(mutable, LayerChoice | InputChoice):
            continue
        _check_shared(first.setdefault(mutable.key, mutable), mutable)
        if isinstance(mutable, InputChoice):
            for source in mutable.choose_from:
                if source not in known:
                    raise SpaceError(
                        f"{source!r} required by {mutable.key!r} not found in keys that appeared before, "
                        f"and is not NO_KEY; known here: {', '.join(sorted(known - {''})) or 'none'}"
                    )


def _check_shared(first: Choice, other: Choice) -> None:
    if len(first) != len(other):
        raise SpaceError(
            f"choices that share the key {first.key!r} differ: {first.name!r} has {len(first)} candidates, "
            f"{other.name!r} has {len(other)}"
        )
