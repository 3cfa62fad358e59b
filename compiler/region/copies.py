"""Parameters and running statistics as executors want them: dense, and in the type that plans compute in."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nascompile.compiler.region.ir import Conv, Graph, Norm, Op, TensorRef, Weight
from nascompile.compiler.region.remembered import remembered
from nascompile.compiler.region.types import TYPE_OF, is_computed
from nascompile.kernels.facts import Facts


class Copies:
    """A region's copies of tensors that are strided or of another type than its plans compute in.

    They are filled again and again: a thousand new tensors cost four times as much as filling them.
    """

    def __init__(self) -> None:
        self._copies: dict[TensorRef, Tensor] = {}

    def get(self, ref: TensorRef, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy for a tensor, whatever it holds."""
        copy = self._copies.get(ref)
        like = (value.shape, dtype, value.device)
        if copy is None or (copy.shape, copy.dtype, copy.device) != like:
            copy = self._copies[ref] = torch.empty(value.shape, dtype=dtype, device=value.device)
        return copy


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """How tensors look; fits: whether the executor takes all of them as they are."""

    facts: Facts
    fits: bool


class DenseTensors:
    """The tensors that `refs` refer to, as the executor of a plan wants them. Call without gradients."""

    def __init__(self, graph: Graph, refs: Sequence[TensorRef], copies: Copies, device: torch.device) -> None:
        self._graph, self.refs, self._copies, self._device = graph, refs, copies, device
        self._shapes = [ref.value.shape for ref in refs]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._dicts, self._names = [ref.dictionary for ref in refs], [ref.name for ref in refs]
        self._types = [torch.int64 if ref.is_counter else graph.dtype for ref in refs]
        self._own: list[Tensor | None] = [None] * len(refs)
        self._last: Look | None = None
        self._live: dict[frozenset[Weight], list[int]] = {}

    def values(self) -> list[Tensor]:
        """The tensors now."""
        return list(map(operator.getitem, self._dicts, self._names))

    def look(self, values: Sequence[Tensor]) -> Look:
        """How `values` look: the same answer as long as they look the same."""
        last = self._last
        if last is None or not last.facts.hold(values):
            fits = list(map(TYPE_OF, values)) == self._types and all(map(Tensor.is_contiguous, values))
            fits = fits and all(value.device == self._device for value in values)
            last = self._last = Look(Facts(values), fits and list(map(Tensor.size, values)) == self._shapes)
        return last

    def misshapen(self, values: Sequence[Tensor]) -> str | None:
        """What is said of the first tensor that a plan cannot take, not even a copy of it; or None."""
        for ref, value, shape in zip(self.refs, values, self._shapes, strict=True):
            if value.shape != shape:
                return f"{ref.name} has the shape {tuple(value.shape)}, {tuple(shape)} before"
            if value.device != self._device:
                return f"{ref.name} is on {value.device}, the images on {self._device}"
            if ref.is_counter and value.dtype != torch.int64:
                return f"{ref.name} counts in {value.dtype}"
        return None

    def of(self, values: list[Tensor], chosen: frozenset[Weight]) -> list[Tensor]:
        """`values`, which `refs` refer to: themselves, or copies in the type of the plan. What the decision
        does not need stays as it is."""
        if self.look(values).fits:
            return values
        found = list(values)
        fitting = {self._graph.dtype, torch.int64}
        # one tensor that several modules hold has one copy
        filled: dict[int, Tensor] = {}
        sources: list[Tensor] = []
        for k in self._needed(chosen):
            value = values[k]
            if value.dtype in fitting and value.is_contiguous():
                continue
            copy = filled.get(id(value))
            if copy is None:
                copy = filled[id(value)] = self._copy(k, value)
                sources.append(value)
            found[k] = copy
        _copy(list(filled.values()), sources)
        return found

    def now(self, chosen: frozenset[Weight]) -> list[Tensor]:
        """The tensors now, as the executor wants them."""
        return self.of(self.values(), chosen)

    def flat(self, dense: Sequence[Tensor], chosen: frozenset[Weight]) -> Tensor | None:
        """Copies, in one piece, of what the decision needs of `dense`; None where it needs nothing."""
        needed = self._needed(chosen)
        return torch._C._nn.flatten_dense_tensors([dense[k] for k in needed]) if needed else None  # type: ignore[attr-defined]

    def restored(self, flat: Tensor | None, chosen: frozenset[Weight]) -> list[Tensor]:
        """The tensors, but what `flat` has copied as it was then."""
        found = self.values()
        if flat is not None:
            needed = self._needed(chosen)
            for k, piece in zip(needed, flat.split([self._sizes[k] for k in needed]), strict=True):
                found[k] = piece
        return found

    def write_back(
        self, values: Sequence[Tensor], copies: Sequence[Tensor], chosen: frozenset[Weight]
    ) -> None:
        """Round what `of` gave for `values`, where it was copies, into these."""
        if copies is values:
            return
        changed = [k for k in self._needed(chosen) if copies[k] is not values[k]]
        _copy([values[k] for k in changed], [copies[k] for k in changed])

    def _copy(self, k: int, value: Tensor) -> Tensor:
        copy = self._own[k]
        if copy is None:
            copy = self._own[k] = self._copies.get(self.refs[k], value, self._graph.dtype)
        return copy

    def _needed(self, chosen: frozenset[Weight]) -> list[int]:

        def find() -> list[int]:
            computed = (value for value in self._graph.values if is_computed(value, chosen))
            live = {ref for value in computed for ref in refs_of(value.op)}
            return [k for k, ref in enumerate(self.refs) if ref in live]

        return remembered(self._live, chosen, find)


def parameters_of(graph: Graph) -> list[TensorRef]:
    """The parameters that a region reads, each once."""
    found: dict[TensorRef, None] = {}
    for value in graph.values:
        op = value.op
        refs = (op.weight,) if isinstance(op, Conv) else (op.gamma, op.beta) if isinstance(op, Norm) else ()
        found.update(dict.fromkeys(ref for ref in refs if ref is not None))
    return list(found)


def buffers_of(graph: Graph) -> list[TensorRef]:
    """The running statistics that a region updates, each once."""
    return _statistics(op for op in _norms(graph) if op.updates)


def fixed_of(graph: Graph) -> list[TensorRef]:
    """The running statistics that a region reads and leaves as they are, each once."""
    fixed = _statistics(op for op in _norms(graph) if not op.by_batch)
    return [ref for ref in fixed if not ref.is_counter]


def running_of(graph: Graph) -> list[TensorRef]:
    """All running statistics that a region reads or updates, each once."""
    return _statistics(_norms(graph))


def _norms(graph: Graph) -> Iterator[Norm]:
    return (value.op for value in graph.values if isinstance(value.op, Norm))


def _statistics(norms: Iterable[Norm]) -> list[TensorRef]:
    refs = (ref for op in norms for ref in (op.running_mean, op.running_var, op.counter) if ref is not None)
    return list(dict.fromkeys(refs))


def refs_of(op: Op) -> list[TensorRef]:
    """The parameters and buffers that an operation names."""
    found = (getattr(op, field.name) for field in fields(op))
    return [ref for ref in found if isinstance(ref, TensorRef)]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)  # type: ignore[reportPrivateImportUsage]
