"""What a region computes: a small graph of image operations, read from the fx graph, equal values merged.

Merging equal values is the sharing of parameter-free candidates and common prefixes: two edges that pool the
same source pool it once, and each normalisation keeps its own running statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nascompile.kernels.plan.steps import Activation


class Unsupported(Exception):
    """Says in words why something cannot be part of a region."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A parameter or buffer of a module, looked up when the plan runs."""

    module: nn.Module
    name: str

    @property
    def holder(self) -> dict[str, Any]:
        """The module's parameters or its buffers, whichever the tensor is one of."""
        parameters = self.module._parameters
        return self.module._buffers if parameters.get(self.name) is None else parameters

    @property
    def dictionary(self) -> dict[str, Any]:
        """Where the module keeps the tensor."""
        return self.module._buffers if self.name in self.module._buffers else self.module._parameters

    @property
    def value(self) -> Tensor:
        """The tensor now."""
        return self.dictionary[self.name]

    def __hash__(self) -> int:
        return hash((id(self.module), self.name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorRef) and self.module is other.module and self.name == other.name


class Weight(NamedTuple):
    """The decision's weight of candidate `index` of the choice called `key`; that `of_mean` is divided by
    the number chosen."""

    key: str
    index: int
    of_mean: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Input `index` of the region."""

    index: int


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution without bias: dense (groups 1) or depthwise (one filter a channel)."""

    weight: TensorRef
    is_depthwise: bool
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def is_pointwise(self) -> bool:
        """A dense 1x1 convolution of stride one."""
        plain = self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        return plain and not self.is_depthwise


@dataclass(frozen=True, slots=True)
class Norm:
    """BatchNorm; without any statistics the addition of a bias (beta).

    `by_batch`: whether it uses the statistics of the batch. `first`: the norm's first channel, where it is
    part of a norm over concatenated values. momentum < 0 is a cumulative average.
    """

    gamma: TensorRef | None
    beta: TensorRef | None
    running_mean: TensorRef | None
    running_var: TensorRef | None
    counter: TensorRef | None
    by_batch: bool
    updates: bool
    epsilon: float
    momentum: float
    first: int = 0


@dataclass(frozen=True, slots=True)
class Act:
    """ReLU or ReLU6."""

    kind: Activation


@dataclass(frozen=True, slots=True)
class PoolOp:
    """Max or average pooling."""

    is_max: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    counts_padding: bool


@dataclass(frozen=True, slots=True)
class Crop:
    """x[:, :, top:, left:]."""

    top: int
    left: int


@dataclass(frozen=True, slots=True)
class Channels:
    """x[:, first::step], `count` channels."""

    first: int
    step: int
    count: int


@dataclass(frozen=True, slots=True)
class Cat:
    """Concatenation of channels."""


@dataclass(frozen=True, slots=True)
class Zero:
    """Zeros of a size of their own; a term of a sum that adds nothing. `like`: the number of the value whose
    type they take."""

    like: int


@dataclass(frozen=True, slots=True)
class TermInfo:
    """How a term enters a sum: its weight, or None for one, and what must be chosen for it to take part."""

    weight: Weight | None
    needs: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """A weighted sum; one TermInfo for every input."""

    terms: tuple[TermInfo, ...]


Op = Source | Conv | Norm | Act | PoolOp | Crop | Channels | Cat | Zero | Sum
Shape = tuple[int, int, int]


@dataclass(eq=False, slots=True)
class Value:
    """One image: (channels, height, width). `owners`: the decisions that ask for it, or None where it is
    always computed."""

    op: Op
    inputs: tuple[Value, ...]
    shape: Shape
    number: int
    owners: set[Weight] | None = field(default_factory=set)
    users: list[Value] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.shape[0]


class Graph:
    """The values of a region in the order of their computation."""

    def __init__(
        self, sources: Sequence[Shape], dtype: torch.dtype, device: str, *, shares: bool = True
    ) -> None:
        self._shares = shares
        self.dtype, self.device = dtype, device
        self.values: list[Value] = []
        self._known: dict[object, Value] = {}
        self.outputs: list[Value] = []
        self.sources = [self.add(Source(index), (), shape, None) for index, shape in enumerate(sources)]

    def add(self, op: Op, inputs: Iterable[Value], shape: Shape, owner: Weight | None) -> Value:
        """The value of `op`, a known one if there is an equal one. `owner`: the decision that asks, None:
        always."""
        inputs = tuple(inputs)
        key = (op, shape, tuple(value.number for value in inputs))
        found = self._known.get(key) if self._shares else None
        if found is None:
            found = Value(op, inputs, shape, len(self.values))
            self.values.append(found)
            self._known[key] = found
            for value in inputs:
                value.users.append(found)
        if owner is None:
            found.owners = None
        elif found.owners is not None:
            found.owners.add(owner)
        return found
