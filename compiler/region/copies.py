"""Parameters and running statistics as executors want them: dense, and in the type that plans compute in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from nascompile.compiler.region.ir import Graph, Op, TensorRef, Weight
from nascompile.compiler.region.types import is_computed

LIVE_LIMIT = 4096
"""Decisions for which it is kept what they need."""


class Copies:
    """A region's copies of tensors that are strided or of another type than its plans compute in.

    They are filled again and again: a thousand new tensors cost four times as much as filling them.
    """

    def __init__(self) -> None:
        self._copies: dict[TensorRef, Tensor] = {}

    def get(self, ref: TensorRef, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy for a tensor, whatever it holds."""
        copy = self._copies.get(ref)
        if copy is None or copy.shape != value.shape or copy.dtype != dtype:
            copy = self._copies[ref] = torch.empty(value.shape, dtype=dtype, device=value.device)
        return copy


class DenseTensors:
    """Hands the tensors of a plan to its executor, and takes changes back. Without gradients."""

    def __init__(self, graph: Graph, copies: Copies) -> None:
        self._graph, self._copies = graph, copies
        self._live: dict[frozenset[Weight], frozenset[TensorRef]] = {}

    def of(
        self, refs: Sequence[TensorRef], values: Sequence[Tensor], chosen: frozenset[Weight]
    ) -> list[Tensor]:
        """`values`, which `refs` refer to: themselves, or copies in the type of the plan.

        Copies of what the decision does not need hold anything.
        """
        dtype = self._graph.dtype
        dense = [value.is_contiguous() and value.dtype in (dtype, torch.int64) for value in values]
        if all(dense):
            return list(values)
        live, found = self._needed(chosen), list(values)
        # one tensor that several modules hold has one copy
        filled: dict[int, Tensor] = {}
        sources: list[Tensor] = []
        for k, (ref, value) in enumerate(zip(refs, values, strict=True)):
            if dense[k]:
                continue
            copy = filled.get(id(value))
            found[k] = self._copies.get(ref, value, dtype) if copy is None else copy
            if copy is None and ref in live:
                filled[id(value)] = found[k]
                sources.append(value)
        _copy(list(filled.values()), sources)
        return found

    def write_back(
        self,
        refs: Sequence[TensorRef],
        values: Sequence[Tensor],
        copies: Sequence[Tensor],
        chosen: frozenset[Weight],
    ) -> None:
        """Round what `of` gave for `values`, if it was copies, into these, where the decision needs them."""
        pairs = [(v, c, ref) for v, c, ref in zip(values, copies, refs, strict=True) if c is not v]
        live = self._needed(chosen) if pairs else ()
        changed = [(value, copy) for value, copy, ref in pairs if ref in live]
        _copy([value for value, _ in changed], [copy for _, copy in changed])

    def _needed(self, chosen: frozenset[Weight]) -> frozenset[TensorRef]:
        found = self._live.get(chosen)
        if found is None:
            if len(self._live) >= LIVE_LIMIT:
                self._live.clear()
            values = [value for value in self._graph.values if is_computed(value, chosen)]
            found = self._live[chosen] = frozenset(ref for value in values for ref in refs_of(value.op))
        return found


def refs_of(op: Op) -> list[TensorRef]:
    """The parameters and buffers that an operation names."""
    found = (getattr(op, field.name) for field in fields(op))
    return [ref for ref in found if isinstance(ref, TensorRef)]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)  # type: ignore[reportPrivateImportUsage]
