"""How a trace records the constructors of old torch: `torch.FloatTensor(n, 1, 1, 1)`, `Variable(x)`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.autograd.variable import VariableMeta

from nascompile.compiler.guards import NotTraceable
from nascompile.compiler.patching import replaced

Record = Callable[..., Any]
_NAMES = tuple(
    f"{kind}Tensor"
    for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
)
KINDS = tuple((home, name) for home in (torch, torch.cuda) for name in _NAMES if hasattr(home, name))
"""The types of old torch: where they stand, and their names."""
# while a program is traced, torch.empty is a function that records
_EMPTY = torch.empty
_REFUSED = "new() received an invalid combination of arguments"


class Constructor:
    """Stands for a type of old torch while a program is traced: a call is recorded."""

    def __init__(self, kind: Any, record: Record) -> None:
        self.kind, self._record, self._thread = kind, record, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return self.kind(*args, **kwargs)
        if kwargs or not args:
            raise NotTraceable(f"calls torch.{self.kind.__name__} with {', '.join(kwargs) or 'no'} arguments")
        first = args[0]
        if len(args) > 1 or isinstance(first, int):
            device = "cuda" if self.kind.is_cuda else "cpu"
            return self._record(_EMPTY, args, {"dtype": self.kind.dtype, "device": device})
        return self._record(self.kind, args, {})

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, self.kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)


@contextmanager
def recorded_constructors(record: Record) -> Iterator[None]:
    """Meanwhile `record(function, args, kwargs)` gets the calls of such constructors."""

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else None
        if not isinstance(first, fx.Proxy):
            return type.__call__(cls, *args, **kwargs)
        if len(args) > 1 or any(kwargs.values()):
            raise NotTraceable("makes a Variable that wants a gradient")
        return first.detach()

    with ExitStack() as patches:
        for home, name in KINDS:
            patches.enter_context(replaced(home, name, Constructor(getattr(home, name), record)))
        # a stand-in is in the thread that traces alone
        patches.enter_context(replaced(VariableMeta, "__call__", call))
        yield


def why_constructor(error: Exception) -> str | None:
    """In words, where a constructor of torch refused a size that is known only when the program runs."""
    if not isinstance(error, TypeError) or _REFUSED not in str(error):
        return None
    return (
        "makes a tensor by its type, of a size that is known only when it runs: "
        "torch.empty(size) can be traced, torch.Tensor(size) cannot"
    )
