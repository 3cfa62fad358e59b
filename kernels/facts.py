"""How tensors look: their types, sizes, strides and devices, and whether they want gradients. Seen once, and
told at a glance afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_KNOWN = ("2.11.", "2.12.", "2.13.")
"""Versions of torch whose `TensorGuards` is as it is used here: it is not public, and crashes when built
otherwise."""


class Facts:
    """How some tensors look at present. Any others may be held against it; none are kept."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._firsts = _firsts(tensors)
        # torch's guards take a tensor that comes twice for another call
        self._again = [(k, first) for k, first in enumerate(self._firsts) if k != first]
        self._places = [k for k, first in enumerate(self._firsts) if k == first]
        self.distinct = not self._again
        """Whether none of the tensors came twice."""
        self._guards = _guards([tensors[k] for k in self._places])
        self._looks = _looks(tensors) if self._guards is None else []

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether as many tensors look the same one by one, and the same ones come twice; may be False in
        another state of autocast."""
        if self._guards is None:
            return _looks(tensors) == self._looks and _firsts(tensors) == self._firsts
        if self.distinct:
            return self._guards.check(*tensors)
        return (
            len(tensors) == len(self._firsts)
            and all(tensors[k] is tensors[first] for k, first in self._again)
            and self._guards.check(*[tensors[k] for k in self._places])
        )


def _firsts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor comes for the first time."""
    found: dict[int, int] = {}
    return [found.setdefault(id(tensor), k) for k, tensor in enumerate(tensors)]


def _guards(tensors: Sequence[Tensor]) -> Any:
    """What torch.compile holds its inputs against: thousands of tensors in a fraction of a millisecond."""
    if not torch.__version__.startswith(_KNOWN):
        return None
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def _looks(tensors: Sequence[Tensor]) -> list[Any]:
    return [(type(x), x.dtype, x.device, x.size(), x.stride(), x.requires_grad) for x in tensors]
