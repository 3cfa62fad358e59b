"""Random search spaces full of convolutions, as plain data that prints as a program: see fuzz.py."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.mutables import InputChoice, LayerChoice
from tests.compiler.region_layouts import Split
from tests.compiler.region_models import (
    DropPath,
    FactorizedReduce,
    MBConv,
    Nothing,
    SepConv,
    TimesZero,
    Unit,
    pool_bn,
)
from tests.compiler.region_patterns import Acted, MobileBlock, OnceForAll


@dataclass(frozen=True)
class Edge:
    """A choice of `candidates` on value `source`; `choose`: an InputChoice among these values comes first.

    how: "op", "residual" or "twice". after: a layer, or "". reads: a value that is added, or None.
    """

    source: int
    candidates: tuple[str, ...]
    how: str = "op"
    after: str = ""
    reads: int | None = None
    choose: tuple[int, ...] = ()
    reduction: str = "sum"
    key: str | None = None
    choose_reduction: str = "sum"
    choose_key: str | None = None


@dataclass(frozen=True)
class Space:
    """A model, and what is done with it: one step for every batch size, mode and kind of decision.

    second: what becomes of a second input, "added" or "chosen", or "". loss: of "all" outputs at once, the
    "first", the "last", or "one by one". gradients: "fresh" in every step, "zeroed" or "accumulated" over two
    passes. frozen: which parameters want no gradient.
    """

    channels: int
    size: tuple[int, int]
    edges: tuple[Edge, ...]
    batches: tuple[int, ...]
    modes: tuple[bool, ...]
    decisions: tuple[str, ...]
    reduce: tuple[str, ...] = ()
    end: str = "last"
    optimizer: str = "sgd"
    channels_last: bool = False
    seed: int = 0
    second: str = ""
    loss: str = "all"
    gradients: str = "fresh"
    frozen: str = "none"

    @property
    def inner_size(self) -> tuple[int, int]:
        """Height and width of the values."""
        height, width = self.size
        return ((height + 1) // 2, (width + 1) // 2) if self.reduce else self.size


def _plain(conv: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda c: nn.Sequential(nn.ReLU(), conv(c))


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "relu_conv_bn": lambda c: Unit("acb", c),
    "conv_bn_relu": lambda c: Unit("cba", c, bias=True),
    "bn_relu_conv": lambda c: Unit("bac", c, 1, functional=True),
    "conv_relu_bn": lambda c: Unit("cab", c, affine=False),
    "untracked": lambda c: Unit("acb", c, track_running_stats=False),
    "cumulative": lambda c: Unit("acb", c, 1, momentum=None),
    "dilated": lambda c: Unit("acb", c, 3, dilation=2),
    "conv5": lambda c: Unit("acb", c, 5, affine=False),
    "conv1x3": lambda c: Unit("acb", c, (1, 3)),
    "conv3x1_bias": _plain(lambda c: nn.Conv2d(c, c, (3, 1), padding=(1, 0))),
    "depthwise": _plain(lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c)),
    "pointwise": _plain(lambda c: nn.Conv2d(c, c, 1, bias=False)),
    "sep3": lambda c: SepConv(c, 3),
    "sep5": lambda c: SepConv(c, 5, affine=False),
    "mb3": lambda c: MBConv(c, 3, 2),
    "mb5": lambda c: MBConv(c, 5, 1),
    "max": lambda c: nn.MaxPool2d(3, 1, 1),
    "avg": lambda c: nn.AvgPool2d(3, 1, 1),
    "avg_bn": lambda c: pool_bn(nn.AvgPool2d(3, 1, 1, count_include_pad=False), c),
    "skip": lambda c: nn.Identity(),
    "none": lambda c: Nothing(),
    "relu": lambda c: nn.ReLU(),
    "bn": lambda c: nn.BatchNorm2d(c),
    "silu": lambda c: Acted(F.silu, c),
    "gelu": lambda c: nn.GELU(),
    "hardswish": lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding="same"), nn.Hardswish()),
    "excited": lambda c: MobileBlock(c, 3, nn.Hardswish, "mean"),
    "gated": lambda c: OnceForAll(c),
    "split": lambda c: Split(c) if c > 3 else nn.Sigmoid(),
    "times_zero": lambda c: TimesZero(),
}
RARE: dict[str, Callable[[int], nn.Module]] = {
    "mish": lambda c: nn.Mish(),
    "grouped": lambda c: Unit("acb", c, groups=c if c < 4 or c % 2 else 2),
    "dropout": lambda c: nn.Dropout(0.2),
    "drop_path": lambda c: DropPath(Unit("acb", c)),
}
STRIDED: dict[str, Callable[[int], nn.Module]] = {
    "relu_conv_bn": lambda c: Unit("acb", c, stride=2),
    "sep3": lambda c: SepConv(c, 3, 2),
    "mb3": lambda c: MBConv(c, 3, 2, 2),
    "max": lambda c: nn.MaxPool2d(3, 2, 1),
    "avg": lambda c: pool_bn(nn.AvgPool2d(3, 2, 1, count_include_pad=False), c),
    "dilated": lambda c: Unit("acb", c, 3, dilation=2, stride=2),
    "none": lambda c: Nothing(2),
    "reduce": FactorizedReduce,
}
AFTER = ("", "", "", "relu", "bn", "conv", "mish")


class Net(nn.Module):
    """The model of a space."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space, c = space, space.channels
        self.stem = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.reduce = LayerChoice([STRIDED[name](c) for name in space.reduce]) if space.reduce else None
        self.ops, self.after, self.choose = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        every = {**LAYERS, **RARE, "conv": lambda c: nn.Conv2d(c, c, 1), "": lambda c: nn.Identity()}
        for edge in space.edges:
            layers: Any = [every[name](c) for name in edge.candidates]
            self.ops.append(LayerChoice(layers, reduction=edge.reduction, key=edge.key))
            self.after.append(every[edge.after](c))
            self.choose.append(
                InputChoice(
                    n_candidates=len(edge.choose), reduction=edge.choose_reduction, key=edge.choose_key
                )
                if edge.choose
                else nn.Identity()
            )
        self.second = InputChoice(n_candidates=2) if space.second == "chosen" else None
        values = len(space.edges) + 1
        self.last = nn.Conv2d(c * values, c, 1) if space.end == "cat" else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None = None) -> Any:
        x = self.stem(x)
        if self.reduce is not None:
            x = self.reduce(x)
        if z is not None:
            x = x + z if self.second is None else self.second([x, z])
        values = [x]
        for edge, op, after, choose in zip(self.space.edges, self.ops, self.after, self.choose, strict=True):
            x = choose([values[i] for i in edge.choose]) if edge.choose else values[edge.source]
            y = op(op(x)) if edge.how == "twice" else op(x)
            if edge.how == "residual":
                y = y + x
            if edge.reads is not None:
                y = y + values[edge.reads]
            values.append(after(y))
        if self.space.end == "cat":
            return self.last(F.relu(torch.cat(values, 1)))
        if self.space.end == "several":
            # not a plain mean: behind a BatchNorm its gradient cancels to zero, and all digits are noise
            return values[-1], values[len(values) // 2], values[-1].square().mean((2, 3))
        if self.space.end == "last":
            return values[-1]
        # sum() begins with 0 + x
        return functools.reduce(torch.add, values) if self.space.end == "added" else sum(values)


def build(space: Space) -> nn.Module:
    """The model in fp32; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(space.seed)
        model = Net(space)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                # at zero, what a ReLU does to the norm of a constant is up to rounding
                nn.init.normal_(module.bias, 0.2)
        return model


def draw(seed: int) -> Space:
    """The space of a seed."""
    rng = random.Random(seed)
    channels = rng.choice([3, 5, 8, 8, 8, 12, 16, 16, 24])
    reduce = tuple(rng.sample(sorted(STRIDED), rng.randint(2, 4))) if rng.random() < 0.3 else ()
    size = rng.choice([(4, 4), (5, 5), (7, 5), (6, 3), (4, 3), (8, 6), (9, 2)])
    if "reduce" in reduce:
        # its halves differ on odd sizes, in torch too
        size = rng.choice([(4, 4), (8, 6), (2, 4)])
    steps = rng.randint(2, 4)
    batch = rng.choice([2, 2, 3, 4, 1])
    smallest = ((size[0] + 1) // 2) * ((size[1] + 1) // 2) if reduce else size[0] * size[1]
    if smallest == 1:
        # BatchNorm wants two values a channel
        batch = max(batch, 2)
    last = max(1 if smallest > 1 else 2, batch - 1)
    edges = tuple(_edge(rng, number) for number in range(rng.randint(1, 5)))
    space = Space(
        channels,
        size,
        edges,
        (*(batch for _ in range(steps - 1)), last),
        tuple(rng.random() < 0.75 for _ in range(steps)),
        tuple(rng.choice(["soft", "soft", "some", "one", "one", "many"]) for _ in range(steps)),
        reduce,
        rng.choice(["last", "last", "added", "added", "sum", "cat", "several", "several"]),
        rng.choice(["sgd", "adam"]),
        rng.random() < 0.2,
        seed,
    )
    # drawn after all that, so that a seed keeps its layers
    return replace(
        space,
        edges=tuple(_choosing(rng, edge) for edge in space.edges),
        second=rng.choice(["", "", "added", "chosen"]),
        loss=rng.choice(["all", "all", "first", "last", "one by one"]),
        gradients=rng.choice(["fresh", "fresh", "zeroed", "accumulated"]),
        frozen=rng.choice(["none", "none", "none", "some", "all", "by turns", "at last"]),
    )


def _choosing(rng: random.Random, edge: Edge) -> Edge:
    """With reductions and keys for the choice of inputs, and another reduction for a shared key."""
    reduction = rng.choice(["sum", "mean"]) if edge.key is not None and rng.random() < 0.5 else edge.reduction
    key = rng.choice([None, f"shared_{('two', 'three')[len(edge.choose) - 2]}"]) if edge.choose else None
    return replace(
        edge,
        reduction=reduction,
        choose_reduction=rng.choice(["sum", "sum", "mean"]),
        choose_key=key if rng.random() < 0.4 else None,
    )


def _edge(rng: random.Random, number: int) -> Edge:
    names = sorted(LAYERS) if rng.random() < 0.96 else sorted(RARE)
    count = rng.randint(2, 4)
    key = rng.choice([None, None, None, None, "shared_two", "shared_three"])
    if key is not None:
        count = 2 if key == "shared_two" else 3
    candidates = tuple(rng.choice(names) for _ in range(count))
    values = range(number + 1)
    choose = tuple(rng.sample(values, min(len(values), rng.randint(2, 3)))) if rng.random() < 0.25 else ()
    return Edge(
        rng.choice([number, rng.choice(values)]),
        candidates,
        rng.choice(["op", "op", "op", "residual", "twice"]),
        rng.choice(AFTER) if rng.random() < 0.5 else "",
        rng.choice(values) if rng.random() < 0.3 else None,
        choose if len(choose) > 1 else (),
        "mean" if key == "shared_three" else "sum" if key else rng.choice(["sum", "sum", "mean"]),
        key,
    )


def smaller(space: Space) -> Iterator[Space]:
    """Spaces with something left out."""
    for index in reversed(range(len(space.edges))):
        if len(space.edges) > 1:
            rest = [_without(edge, index + 1) for i, edge in enumerate(space.edges) if i != index]
            yield replace(space, edges=tuple(rest))
    for index in range(len(space.batches)):
        if len(space.batches) > 1:
            keep = [i for i in range(len(space.batches)) if i != index]
            yield replace(
                space,
                batches=tuple(space.batches[i] for i in keep),
                modes=tuple(space.modes[i] for i in keep),
                decisions=tuple(space.decisions[i] for i in keep),
            )
    for index, edge in enumerate(space.edges):
        simpler = [
            replace(edge, candidates=edge.candidates[:i] + edge.candidates[i + 1 :])
            for i in range(len(edge.candidates))
            if len(edge.candidates) > 2 and edge.key is None
        ]
        plain: tuple[dict[str, Any], ...] = (
            *({"how": "op"}, {"after": ""}, {"reads": None}),
            *({"choose": (), "choose_key": None}, {"reduction": "sum"}, {"key": None}),
            *({"choose_reduction": "sum"}, {"choose_key": None}),
        )
        simpler += [replace(edge, **change) for change in plain]
        for one in simpler:
            if one != edge:
                yield replace(space, edges=(*space.edges[:index], one, *space.edges[index + 1 :]))
    changes: tuple[dict[str, Any], ...] = (
        *({"reduce": ()}, {"end": "last"}, {"optimizer": "sgd"}, {"channels_last": False}),
        *({"second": ""}, {"loss": "all"}, {"gradients": "fresh"}, {"frozen": "none"}),
        *({"channels": 8}, {"size": (4, 4)}, {"batches": (2,) * len(space.batches)}),
    )
    for change in changes:
        one = replace(space, **change)
        if one != space:
            yield one


def _without(edge: Edge, value: int) -> Edge:
    """The edge when a value is gone: those after it move down, those who read it read the one before."""

    def moved(index: int) -> int:
        return index - 1 if index >= value else index

    choose = tuple(dict.fromkeys(moved(index) for index in edge.choose))
    return replace(
        edge,
        source=moved(edge.source),
        reads=None if edge.reads is None else moved(edge.reads),
        choose=choose if len(choose) > 1 else (),
    )
