"""What of a region is stored: which values become maps, where they lie, and what the backward pass has to
know.

A value is stored as a map only where it has to be: a normalisation that only sums or one convolution read is
applied where it is read, an activation in front of convolutions likewise, a depthwise convolution followed by
a pointwise one is never stored.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from nascompile.compiler.region.flags import ALWAYS, Flags
from nascompile.compiler.region.ir import (
    Act,
    Arrange,
    Cat,
    Channels,
    Conv,
    Crop,
    Gate,
    Graph,
    Norm,
    Pad,
    PoolOp,
    Spread,
    Sum,
    TensorRef,
    Value,
    Weight,
)
from nascompile.compiler.region.layout import Segments, runs, starts
from nascompile.compiler.region.memory import Buffer, Place, new_place
from nascompile.compiler.region.settings import Settings
from nascompile.compiler.region.tasks import Staged
from nascompile.kernels.plan.steps import MASKS, NONE, Activation


@dataclass(eq=False, slots=True)
class TermOf:
    """One term of a stored sum: weight * value, where the value is a map, normalised or not."""

    value: Value
    norm: Value | None
    weight: Weight | None
    flag: int
    coefficient: Buffer | None


@dataclass(eq=False, slots=True)
class Stored:
    """A value made by Combine: its terms, and what is applied to their sum."""

    terms: list[TermOf]
    constant: Buffer | None
    activation: Activation


@dataclass(eq=False, slots=True)
class ConvOf:
    """A convolution step: the value whose map it writes, what it reads, and its packed weights.

    `depthwise` is set where a depthwise part comes first (or is all there is); `dense` is the dense or
    pointwise part.
    """

    value: Value
    source: Value
    staged: Staged
    staged_norm: Value | None
    crop: tuple[int, int]
    depthwise: Conv | None
    dense: Conv | None
    depthwise_weights: Buffer | None
    weights: Buffer | None

    @property
    def taps_of(self) -> Conv:
        """The part that reads the image."""
        part = self.depthwise or self.dense
        assert part is not None
        return part


def segments_of(norm: Value) -> Segments:
    """Which number of a normalisation's vectors each channel has."""
    assert isinstance(norm.op, Norm)
    if norm.op.is_single:
        own = norm.layout.segments
        return tuple((0, 1, padded + k) for _, count, padded in own for k in range(count))
    return norm.layout.shifted(norm.op.first)


def scale_and_shift(vectors: Buffer | None, channels: int) -> tuple[int, int]:
    """Where a normalisation's scale and shift lie, the last two of its four vectors; NONE without one."""
    if vectors is None:
        return NONE, NONE
    return vectors.offset + 2 * channels, vectors.offset + 3 * channels


class Storage:
    """The maps, vectors, sums and tensors of a region's forward program."""

    def __init__(self, graph: Graph, settings: Settings, flags: Flags) -> None:
        self.graph, self.settings, self.flags = graph, settings, flags
        self.buffers: list[Buffer] = []
        self.places: dict[Value, Place] = {}
        self.stored: dict[Value, Stored] = {}
        # the weights of zeros in stored sums, and when they take part
        self.zeros: dict[Value, list[tuple[Weight, int]]] = {}
        self.convs: dict[Value, ConvOf] = {}
        self.vectors: dict[Value, Buffer] = {}
        self.indices: dict[Value, Buffer] = {}
        self.moments: dict[Value, int] = {}
        self.tensors: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self.sums = 0
        self.outputs = set(graph.outputs)
        self.parts = self._placed_parts()

    # ---- what is stored ----

    def is_lazy_norm(self, value: Value) -> bool:
        """Whether a normalisation is applied by its readers."""
        if not isinstance(value.op, Norm) or value in self.outputs or not value.users:
            return False
        if "delay_norms" in self.settings.without:
            return False
        if all(isinstance(user.op, Sum) for user in value.users):
            return True
        return len(value.users) == 1 and isinstance(value.users[0].op, Conv | Act)

    def is_staged_act(self, value: Value) -> bool:
        """Whether an activation is applied while convolutions read."""
        if not isinstance(value.op, Act) or value in self.outputs or not value.users:
            return False
        if "stage_activations" in self.settings.without:
            return False
        return all(isinstance(user.op, Conv) or self.is_read_in_place(user) for user in value.users)

    def is_read_in_place(self, value: Value) -> bool:
        """Whether convolutions read a crop where the image lies: none of them adds zeros around it."""
        op = value.op
        if not isinstance(op, Crop) or value in self.outputs or not value.users:
            return False
        whole = value.inputs[0].shape[1:]
        reaches = (op.top + value.shape[1], op.left + value.shape[2]) == whole
        plain = reaches and (op.down, op.right) == (1, 1)
        return plain and all(isinstance(u.op, Conv) and u.op.padding == (0, 0) for u in value.users)

    def is_merged_sum(self, value: Value) -> bool:
        """Whether a sum is part of the one sum that reads it."""
        if not isinstance(value.op, Sum) or len(value.users) != 1 or value in self.outputs:
            return False
        if "merge_sums" in self.settings.without:
            return False
        user = value.users[0]
        if isinstance(user.op, Act):
            # without a mask the derivative is that of the sum, which has to be stored
            return user.op.kind in MASKS and not self.is_staged_act(user)
        if not isinstance(user.op, Sum) or user.inputs.count(value) > 1:
            return False
        return user.op.terms[user.inputs.index(value)].weight is None

    def is_fused_depthwise(self, value: Value) -> bool:
        """Whether a depthwise convolution is computed inside the pointwise one that reads it."""
        if not isinstance(value.op, Conv) or not value.op.is_depthwise or value in self.outputs:
            return False
        if "fuse_depthwise" in self.settings.without:
            return False
        users = value.users
        return len(users) == 1 and isinstance(users[0].op, Conv) and users[0].op.is_pointwise

    def _placed_parts(self) -> dict[Value, tuple[Value, int]]:
        """The values that are computed right into a concatenation: which, and their first padded channel."""
        parts: dict[Value, tuple[Value, int]] = {}
        if "place_parts" in self.settings.without:
            return parts
        for cat in self.graph.values:
            if not isinstance(cat.op, Cat):
                continue
            for part, first in zip(cat.inputs, starts_of(cat), strict=True):
                # a part that others read as well must be there whenever they are
                alone = cat.owners is None or len(part.users) == 1
                free = part not in parts and cat.inputs.count(part) == 1 and alone
                if free and isinstance(
                    part.op, Sum | Norm | Act | Conv | PoolOp | Channels | Arrange | Spread | Gate
                ):
                    parts[part] = (cat, first)
        return parts

    # ---- memory ----

    def vector(self, name: str, floats: int) -> Buffer:
        """A new buffer that lives throughout."""
        buffer = Buffer(name, floats, True)
        self.buffers.append(buffer)
        return buffer

    def new_map(self, value: Value, name: str) -> Place:
        """A map of the size of the value."""
        place = new_place(name, self.settings.images, value.layout.padded, *value.shape[1:])
        if isinstance(value.op, Cat):
            place.buffer.borders = starts_of(value)
        self.buffers.append(place.buffer)
        return place

    def place(self, value: Value) -> Place:
        """The map of a value that is stored."""
        if value not in self.places:
            if value in self.parts:
                cat, first = self.parts[value]
                self.places[value] = self.place(cat).part(first, value.layout.padded)
            else:
                self.places[value] = self.new_map(value, f"v{value.number}")
        return self.places[value]

    def tensor(self, what: Hashable) -> int:
        """The number of a tensor: a TensorRef, or ("input", i), ("output", i), "decision"."""
        if what not in self._numbers:
            self._numbers[what] = len(self.tensors)
            self.tensors.append(what)
        return self._numbers[what]

    def optional(self, ref: TensorRef | None) -> int:
        return NONE if ref is None else self.tensor(ref)

    def new_sums(self, count: int) -> int:
        """An offset in the sums."""
        self.sums += count
        return self.sums - count

    def flag(self, value: Value) -> int:
        """When the value is computed."""
        if value.owners is None:
            return ALWAYS
        return self.flags.any_of(self.flags.chosen(owner) for owner in value.owners)


def runs_of(value: Value) -> list[tuple[int, int, int, int]]:
    """How the channels of a Channels, Arrange or Spread come from its input's; see layout.runs."""
    op = value.op
    if isinstance(op, Spread):
        return [(0, 0, padded, count) for _, count, padded in op.layout.segments]
    first, step = (op.first, op.step) if isinstance(op, Channels) else (0, 1)
    return list(runs(value.inputs[0].layout, value.layout, first, step))


def windows_of(value: Value, x: Place, y: Place) -> tuple[Place, Place]:
    """The pixels of x that a Crop or Pad copies, and where they lie in y, its own map."""
    if isinstance(value.op, Pad):
        return x, y.window(value.op.top, value.op.left, (1, 1), (x.height, x.width))
    assert isinstance(value.op, Crop)
    steps = (value.op.down, value.op.right)
    return x.window(value.op.top, value.op.left, steps, (y.height, y.width)), y


def starts_of(cat: Value) -> list[int]:
    """The padded channels at which the parts of a concatenation begin."""
    return starts([part.layout for part in cat.inputs])
