"""What a user writes: LayerChoice, InputChoice and MutableScope, with the names and semantics of NNI 1.x.

A choice knows its candidates; which of them run is decided by the mutator that is bound to the model.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from nascompile.compiler.decision import REDUCTIONS

if TYPE_CHECKING:
    from nascompile.compiler.mutator import BaseMutator

_provisional = itertools.count(1)
_forced: ContextVar[BaseMutator | None] = ContextVar("forced_mutator", default=None)


@contextmanager
def forced_mutator(mutator: BaseMutator) -> Iterator[None]:
    """Let `mutator` decide for every mutable, bound or not, as long as the context lasts."""
    token = _forced.set(mutator)
    try:
        yield
    finally:
        _forced.reset(token)


class Mutable(nn.Module):
    """A module whose behaviour is decided by a mutator.

    `key` identifies the decision: mutables with equal keys share one. Without a key, one is given per model
    when the search space is read (`LayerChoice1`, `InputChoice2`, ... in registration order); until then
    `key` is a placeholder that `choose_from` of another choice may refer to.
    """

    def __init__(self, key: str | None = None) -> None:
        super().__init__()
        if key is not None and not isinstance(key, str):
            warnings.warn(
                f"key {key!r} of {type(self).__name__} is not a string, using {str(key)!r}", stacklevel=2
            )
            key = str(key)
        self._has_own_key = key is not None
        self._placeholder = None if key is not None else f"{type(self).__name__}?{next(_provisional)}"
        self._key: str = key if key is not None else str(self._placeholder)
        self._name: str | None = None
        self.__dict__["mutator"] = None

    @property
    def key(self) -> str:
        """The name of the decision this mutable follows."""
        return self._key

    @property
    def name(self) -> str:
        """Dotted path in the model; the key while no search space has been read."""
        return self._name if self._name is not None else self._key

    def set_mutator(self, mutator: BaseMutator) -> None:
        """Bind to `mutator`; raises RuntimeError when another one is bound (its `release()` frees the
        model)."""
        bound = self.bound_mutator
        if bound is not None and bound is not mutator:
            raise RuntimeError(
                f"`set_mutator` is called more than once: {self.key!r} is already bound to a "
                f"{type(bound).__name__}; call its release() before binding a {type(mutator).__name__}"
            )
        self.__dict__["mutator"] = mutator

    @property
    def bound_mutator(self) -> BaseMutator | None:
        """The mutator in charge, or None."""
        mutator = self.__dict__["mutator"]
        return None if mutator is None or mutator.is_released else mutator

    def require_mutator(self) -> BaseMutator:
        """The mutator in charge; raises ValueError when there is none."""
        forced = _forced.get()
        mutator = self.bound_mutator if forced is None else forced
        if mutator is None:
            raise ValueError(
                f"Mutator not set for {self.name!r}. Bind one to the model first "
                "(for example `RandomMutator(model)`), and create mutables in `__init__`, not in `forward`"
            )
        return mutator

    def __deepcopy__(self, memo: dict[int, Any]) -> Mutable:
        # the copy follows the same mutator, unless the mutator is being copied along
        mutator = self.__dict__["mutator"]
        if mutator is not None:
            memo.setdefault(id(mutator), mutator)
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def extra_repr(self) -> str:
        return f"key={self.key!r}"


class MutableScope(Mutable):
    """A named region of the model; the mutator is told when the forward pass enters and leaves it.

    `key` is mandatory. A scope makes no decision and never appears in an architecture.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key=key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mutator = self.require_mutator()
        mutator.enter_mutable_scope(self)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            mutator.exit_mutable_scope(self)


class LayerChoice(Mutable):
    """One of several candidate layers (or a weighted sum of them), called with the same arguments.

    `op_candidates` is a list of modules (named "0", "1", ...) or an OrderedDict of named ones. `reduction`
    combines several chosen outputs: "sum", "mean", "concat" (dimension 1) or "none" (a list). With
    `return_mask` the call returns `(output, mask)`. Raises TypeError and ValueError for unusable candidates
    and reductions.
    """

    _RESERVED: ClassVar[frozenset[str]] = frozenset(
        {"length", "reduction", "return_mask", "_key", "key", "names"}
    )

    def __init__(
        self,
        op_candidates: Sequence[nn.Module | None] | OrderedDict[str, Any],
        reduction: str = "sum",
        return_mask: bool = False,
        key: str | None = None,
    ) -> None:
        super().__init__(key=key)
        self.names: list[str] = []
        if isinstance(op_candidates, dict):
            named = [(str(name), module) for name, module in op_candidates.items()]
        elif isinstance(op_candidates, list | tuple | nn.ModuleList):
            named = [(str(index), module) for index, module in enumerate(op_candidates)]
        else:
            raise TypeError(
                f"Unsupported op_candidates type: {type(op_candidates).__name__}; "
                "expected a list or an OrderedDict"
            )
        for name, module in named:
            _check_candidate(name, module, self._RESERVED)
            self.add_module(name, module)
            self.names.append(name)
        self.reduction = _check_reduction(reduction)
        self.return_mask = return_mask

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return (self._modules[name] for name in list(self.names))

    def __contains__(self, item: object) -> bool:
        return item in self.names or any(item is module for module in self)

    def _resolve(self, index: int | str) -> str:
        if isinstance(index, str):
            if index not in self.names:
                raise KeyError(f"{self.key!r} has no candidate {index!r}; it has: {', '.join(self.names)}")
            return index
        return self.names[index]

    def __getitem__(self, index: int | slice | str) -> Any:
        if isinstance(index, slice):
            return [self._modules[name] for name in self.names[index]]
        return self._modules[self._resolve(index)]

    def __setitem__(self, index: int | str, module: nn.Module | None) -> None:
        name = self._resolve(index)
        _check_candidate(name, module, self._RESERVED)
        self._modules[name] = module

    def __delitem__(self, index: int | slice | str) -> None:
        doomed = self.names[index] if isinstance(index, slice) else [self._resolve(index)]
        for name in doomed:
            del self._modules[name]
            self.names.remove(name)

    @property
    def length(self) -> int:
        """Deprecated spelling of `len(choice)`."""
        warnings.warn("LayerChoice.length is deprecated, use len(choice)", DeprecationWarning, stacklevel=2)
        return len(self)

    @property
    def choices(self) -> list[Any]:
        """Deprecated spelling of `list(choice)`."""
        warnings.warn("LayerChoice.choices is deprecated, use list(choice)", DeprecationWarning, stacklevel=2)
        return list(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, mask = self.require_mutator().on_forward_layer_choice(self, *args, **kwargs)
        return (out, mask) if self.return_mask else out


class InputChoice(Mutable):
    """Some of several inputs, reduced to one.

    Give `n_candidates`, or `choose_from`: the keys of the earlier mutables that the inputs come from
    (`NO_KEY` where there is none). `n_chosen` is how many to choose, None for any number. Called with a list
    of inputs, or a dict by the keys of `choose_from`; the output is None when nothing is chosen. Raises
    ValueError for inconsistent counts.
    """

    NO_KEY = ""

    def __init__(
        self,
        n_candidates: int | None = None,
        choose_from: Sequence[str] | None = None,
        n_chosen: int | None = None,
        reduction: str = "sum",
        return_mask: bool = False,
        key: str | None = None,
    ) -> None:
        super().__init__(key=key)
        if n_candidates is None and choose_from is None:
            raise ValueError("InputChoice needs n_candidates or choose_from")
        sources = [self.NO_KEY] * int(n_candidates or 0) if choose_from is None else list(choose_from)
        if n_candidates is None:
            n_candidates = len(sources)
        if n_candidates <= 0:
            raise ValueError(f"InputChoice: n_candidates is {n_candidates}, expected at least 1")
        if len(sources) != n_candidates:
            raise ValueError(
                f"InputChoice: choose_from has {len(sources)} entries, expected n_candidates = {n_candidates}"
            )
        if n_chosen is not None and not 0 <= n_chosen <= n_candidates:
            raise ValueError(f"InputChoice: n_chosen is {n_chosen}, expected None or 0 to {n_candidates}")
        self.n_candidates = n_candidates
        self.choose_from = sources
        # as given: the keys of the sources may change when the model becomes a part of another one
        self._given_sources = tuple(sources)
        self.n_chosen = n_chosen
        self.reduction = _check_reduction(reduction)
        self.return_mask = return_mask

    def __len__(self) -> int:
        return self.n_candidates

    def __bool__(self) -> bool:
        return True

    def as_list(self, optional_inputs: Any) -> list[Any]:
        """The inputs in the order of `choose_from`; raises ValueError when they do not fit."""
        if isinstance(optional_inputs, dict):
            if len(set(self.choose_from)) != len(self.choose_from) or set(optional_inputs) != set(
                self.choose_from
            ):
                raise ValueError(
                    f"{self.key!r}: inputs are named {sorted(map(str, optional_inputs))}, "
                    f"expected {self.choose_from}"
                )
            return [optional_inputs[source] for source in self.choose_from]
        if not isinstance(optional_inputs, list | tuple):
            raise TypeError(
                f"{self.key!r}: expected a list or dict of inputs, got {type(optional_inputs).__name__}"
            )
        if len(optional_inputs) != self.n_candidates:
            raise ValueError(f"{self.key!r}: got {len(optional_inputs)} inputs, expected {self.n_candidates}")
        return list(optional_inputs)

    def forward(self, optional_inputs: Any) -> Any:
        inputs = self.as_list(optional_inputs)
        out, mask = self.require_mutator().on_forward_input_choice(self, inputs)
        return (out, mask) if self.return_mask else out


def _check_candidate(name: str, module: object, reserved: frozenset[str]) -> None:
    if name in reserved:
        raise ValueError(
            f"candidate name {name!r} is reserved; reserved names: {', '.join(sorted(reserved))}"
        )
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"candidate {name!r} is a {type(module).__name__}, expected a torch.nn.Module")


def _check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'Unrecognized reduction policy: "{reduction}"; expected one of: {", ".join(REDUCTIONS)}'
        )
    return reduction
