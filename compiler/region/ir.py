"""What a region computes: a small graph of image operations, read from the fx graph, equal values merged.

Merging equal values is the sharing of parameter-free candidates and common prefixes: two edges that pool the
same source pool it once, and each normalisation keeps its own running statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from nascompile.compiler.region.layout import Layout, joined, side_by_side
from nascompile.kernels.plan.steps import Activation


class Unsupported(Exception):
    """Says in words why something cannot be part of a region; `node` is where, if that is known."""

    node: fx.Node | None = None


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
    def is_counter(self) -> bool:
        """Whether it counts the batches of a BatchNorm."""
        return self.name == "num_batches_tracked"

    @property
    def value(self) -> Tensor:
        """The tensor now."""
        return self.dictionary[self.name]

    def __hash__(self) -> int:
        return hash((id(self.module), self.name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorRef) and self.module is other.module and self.name == other.name


class Constants(nn.Module):
    """Vectors of one number, which plans read like parameters."""

    def vector(self, number: float, channels: int, **options: Any) -> TensorRef:
        """The vector of so many times the number; one for all who ask for it."""
        name = f"{number!r} {channels}"
        if name not in self._buffers:
            # inference mode is left: a tensor made in it could not be saved for backward
            with torch.inference_mode(False):
                self._buffers[name] = torch.full((channels,), number, **options)
        return TensorRef(self, name)


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
    """A convolution without bias: dense (groups 1) or depthwise (one filter a channel).

    `first`: the first row of the weight, where it is one group of several.
    """

    weight: TensorRef
    is_depthwise: bool
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    first: int = 0

    @property
    def rows(self) -> tuple[TensorRef, int]:
        """The weights it uses, to tell them from others."""
        return self.weight, self.first

    @property
    def is_pointwise(self) -> bool:
        """A dense 1x1 convolution of stride one."""
        plain = self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        return plain and not self.is_depthwise


@dataclass(frozen=True, slots=True)
class Norm:
    """BatchNorm; without any statistics the addition of a bias (beta), a product with slopes (gamma), or
    gamma * x + beta of constants.

    `by_batch`: whether it uses the statistics of the batch. `first`: the norm's first channel, where it is
    part of a norm over concatenated values. momentum < 0 is a cumulative average. `is_single`: its vectors
    have one number for all channels.
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
    is_single: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether gamma and beta are constants."""
        return any(ref is not None and isinstance(ref.module, Constants) for ref in (self.gamma, self.beta))


@dataclass(frozen=True, slots=True)
class Act:
    """An activation."""

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
    """x[:, :, top::down, left::right], as far as the shape says."""

    top: int
    left: int
    down: int
    right: int


@dataclass(frozen=True, slots=True)
class Pad:
    """Zeros around an image: so many rows above and columns on its left, the others as the shape says."""

    top: int
    left: int


@dataclass(frozen=True, slots=True)
class Channels:
    """x[:, first::step], `count` channels."""

    first: int
    step: int
    count: int


@dataclass(frozen=True, slots=True)
class Arrange:
    """The same image in another layout."""

    layout: Layout


@dataclass(frozen=True, slots=True)
class Spread:
    """An image of one channel as every channel of an image with this layout."""

    layout: Layout


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
    """A weighted sum; one TermInfo for every input.

    `like`: the input whose type it takes, where it is made in place.
    """

    terms: tuple[TermInfo, ...]
    like: int | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """image * gate, where the gate is an image of the same size or has one pixel. `like` as in Sum."""

    like: int | None = None


Op = Source | Conv | Norm | Act | PoolOp | Crop | Pad | Channels | Arrange | Spread | Cat | Zero | Sum | Gate
Shape = tuple[int, int, int]


@dataclass(eq=False, slots=True)
class Value:
    """One image: (channels, height, width), whose channels lie in its map as `layout` says. `owners`: the
    decisions that ask for it, or None where it is always computed."""

    op: Op
    inputs: tuple[Value, ...]
    shape: Shape
    layout: Layout
    number: int
    owners: set[Weight] | None = field(default_factory=set)
    users: list[Value] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.shape[0]


class Graph:
    """The values of a region in the order of their computation; `lane`: channels are padded to a multiple of
    it."""

    def __init__(
        self, sources: Sequence[Shape], dtype: torch.dtype, device: str, *, lane: int, shares: bool = True
    ) -> None:
        self._shares, self._lane = shares, lane
        self.dtype, self.device = dtype, device
        self._packed: dict[tuple[TensorRef, int], Layout] = {}
        self._constants = Constants()
        self.values: list[Value] = []
        self._known: dict[object, Value] = {}
        self.outputs: list[Value] = []
        self.sources = [self.add(Source(index), (), shape, None) for index, shape in enumerate(sources)]

    def add(self, op: Op, inputs: Iterable[Value], shape: Shape, owner: Weight | None) -> Value:
        """The value of `op`, a known one if there is an equal one. `owner`: the decision that asks, None:
        always."""
        inputs = self._arranged(op, tuple(inputs), owner)
        key = (op, shape, tuple(value.number for value in inputs))
        # a norm that is called twice updates its statistics twice
        shares = self._shares and not (isinstance(op, Norm) and op.updates)
        found = self._known.get(key) if shares else None
        if found is None:
            found = Value(op, inputs, shape, self._layout(op, inputs, shape), len(self.values))
            self.values.append(found)
            self._known[key] = found
            for value in inputs:
                value.users.append(found)
        if owner is None:
            found.owners = None
        elif found.owners is not None:
            found.owners.add(owner)
        return found

    def scale(self, x: Value, factor: float, summand: float, owner: Weight | None) -> Value:
        """factor * x + summand."""
        options = {"dtype": self.dtype, "device": self.device}
        gamma, beta = (
            None if number == nothing else self._constants.vector(number, x.channels, **options)
            for number, nothing in ((factor, 1.0), (summand, 0.0))
        )
        if gamma is None and beta is None:
            return x
        op = Norm(gamma, beta, None, None, None, False, False, 0.0, 0.0)
        return self.add(op, (x,), x.shape, owner)

    def _layout(self, op: Op, inputs: tuple[Value, ...], shape: Shape) -> Layout:
        if isinstance(op, Arrange | Spread):
            return op.layout
        if isinstance(op, Cat):
            return joined([value.layout for value in inputs])
        keeps = isinstance(op, Norm | Act | PoolOp | Crop | Pad | Gate) or (
            isinstance(op, Conv) and op.is_depthwise
        )
        if keeps:
            return inputs[0].layout
        summed = [value.layout for value in inputs if not isinstance(value.op, Zero)]
        return summed[0] if isinstance(op, Sum) and summed else side_by_side(shape[0], self._lane)

    def _arranged(self, op: Op, inputs: tuple[Value, ...], owner: Weight | None) -> tuple[Value, ...]:
        """The inputs in layouts that suit one another, and the weights that other calls have packed."""
        if isinstance(op, Conv):
            return (self._arrange(inputs[0], self._packed.setdefault(op.rows, inputs[0].layout), owner),)
        if isinstance(op, Gate):
            return (inputs[0], self._arrange(inputs[1], inputs[0].layout, owner))
        if isinstance(op, Sum) and len({x.layout for x in inputs if not isinstance(x.op, Zero)}) > 1:
            target = side_by_side(inputs[0].channels, self._lane)
            owners = [info.needs[0] if info.needs else owner for info in op.terms]
            pairs = zip(inputs, owners, strict=True)
            return tuple(x if isinstance(x.op, Zero) else self._arrange(x, target, who) for x, who in pairs)
        return inputs

    def _arrange(self, value: Value, layout: Layout, owner: Weight | None) -> Value:
        same = value.layout == layout
        return value if same else self.add(Arrange(layout), (value,), value.shape, owner)
