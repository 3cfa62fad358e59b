"""CUDA graphs on a CPU: what a function asks of the device is recorded, not carried out, and can be replayed.

As on a GPU, results do not exist before a replay, memory is used again by each, and reading a value on the
host is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
WRITES_STATISTICS = "aten::native_batch_norm"
"""Its schema does not say so."""


class EmulatedRecorder:
    """Records what passes torch's dispatcher."""

    def __init__(self) -> None:
        self.recordings = 0

    def aside(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> EmulatedRecording:
        self.recordings += 1
        watch = _Watch()
        try:
            with watch:
                outputs = function()
        finally:
            watch.undo()
        return EmulatedRecording(watch.operations, outputs)


class EmulatedRecording:
    def __init__(self, operations: list[tuple[Any, Any, Any, Any]], outputs: Any) -> None:
        self._operations, self.outputs = operations, outputs

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, found in self._operations:
                again = function(*args, **kwargs)
                if any(one.alias_info is not None for one in function._schema.returns):
                    continue
                for old, new in zip(_tensors(found), _tensors(again), strict=True):
                    old.copy_(new)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._own: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READING:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        self._keep(func, args, kwargs)
        found = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, found))
        if all(one.alias_info is None for one in func._schema.returns):
            self._own.update({_address(tensor): tensor for tensor in _tensors(found)})
        return found

    def _keep(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copy what an operation writes to, if it was there before."""
        named = list(zip(func._schema.arguments, args, strict=False))
        named += [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]
        for argument, value in named:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or (func._schema.name == WRITES_STATISTICS and argument.name.startswith("running")):
                for tensor in _tensors(value):
                    at = _address(tensor)
                    if at not in self._own and at not in self._before:
                        self._before[at] = tensor, tensor.detach().clone()

    def undo(self) -> None:
        """What was there is as before; what was made holds nothing yet."""
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.copy_(before)
            for tensor in self._own.values():
                if tensor.is_floating_point() and tensor.numel():
                    tensor.detach().fill_(torch.nan)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
