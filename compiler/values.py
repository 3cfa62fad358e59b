"""What several architectures compute, as one table of values: equal calls on equal values are one entry.

A value is a call of a function or module on other values, named by their numbers; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nascompile.compiler.architecture import Mask


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value with that number inside nested arguments."""

    number: int


@dataclass(eq=False, slots=True)
class Value:
    """One call. `inputs` are the numbers of the values it reads.

    `call` is a function of `args` and `kwargs`; with `copies` what it changes in place is copied before.
    Where `module` is set it is a module that was not looked into, and `masks` are the decisions for the
    choices in it. `norms` are the BatchNorms in it, and `state` is the value whose statistics they take.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    copies: bool = False
    module: nn.Module | None = None
    masks: Mapping[str, Mask] | None = None
    norms: tuple[nn.Module, ...] = ()
    state: int | None = None
    inputs: tuple[int, ...] = ()


class Values:
    """The table. Numbers grow along dependencies: a value's inputs come before it."""

    def __init__(self) -> None:
        self.table: list[Value] = []
        self._numbers: dict[Any, int] = {}

    def __getitem__(self, number: int) -> Value:
        return self.table[number]

    def ref(self, key: Any, value: Value) -> Ref:
        """The value known by `key` and its arguments; `value` is entered when there is none yet."""
        full = (key, value.copies, value.state, key_of(value.args), key_of(value.kwargs))
        if full not in self._numbers:
            value.inputs = tuple(dict.fromkeys(numbers_in((value.args, value.kwargs))))
            self._numbers[full] = len(self.table)
            self.table.append(value)
        return Ref(self._numbers[full])


def key_of(tree: Any) -> Any:
    """Equal for nested arguments that are the same values and constants."""
    if isinstance(tree, list | tuple):
        return (type(tree), tuple(key_of(item) for item in tree))
    if isinstance(tree, Mapping):
        return (type(tree), tuple((key, key_of(item)) for key, item in tree.items()))
    if isinstance(tree, slice):
        return (slice, key_of(tree.start), key_of(tree.stop), key_of(tree.step))
    if isinstance(tree, float | complex):
        return (type(tree), repr(tree))  # 0.0 and -0.0 differ, nan equals itself
    try:
        hash(tree)
    except TypeError:
        return (type(tree), id(tree))
    return (type(tree), tree)


def replace_leaves(tree: Any, replace: Callable[[Any], Any]) -> Any:
    """The same nesting of plain lists, tuples, dicts and slices with other leaves."""
    if isinstance(tree, tuple):
        items = [replace_leaves(item, replace) for item in tree]
        fields = hasattr(tree, "_fields")
        return type(tree)(*items) if fields else tuple(items)
    if isinstance(tree, list):
        return [replace_leaves(item, replace) for item in tree]
    if isinstance(tree, dict):
        return {key: replace_leaves(item, replace) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(replace_leaves(item, replace) for item in (tree.start, tree.stop, tree.step)))
    return replace(tree)


def numbers_in(tree: Any) -> list[int]:
    """The numbers of the values in nested arguments, in order."""
    found: list[int] = []
    replace_leaves(tree, lambda leaf: found.append(leaf.number) if isinstance(leaf, Ref) else None)
    return found
