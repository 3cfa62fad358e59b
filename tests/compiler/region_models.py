"""Small models of the kind that people write, as a table: their layers, inputs, and what becomes of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.mutables import InputChoice, LayerChoice

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """`make` builds the model; its inputs are `batch` images of each of `shapes`.

    `regions`: how many there are. outside: part of the reason why choices stay outside of regions.
    op_by_op: part of the reason why a region has no plan, in_parts: why only its parts have some. evaluated:
    in evaluation there is one region with plans nevertheless.
    """

    name: str
    make: Make
    shapes: tuple[tuple[int, int, int], ...] = ((8, 7, 5),)
    batch: int = 3
    regions: int = 1
    evaluated: bool = False
    outside: str | None = None
    op_by_op: str | None = None
    in_parts: str | None = None


# ----- candidates


class Unit(nn.Module):
    """Activation, convolution and BatchNorm in any order ("acb", "bac", ...), as one writes them by hand."""

    def __init__(
        self, order: str, channels: int, kernel: Any = 3, *, functional: bool = False, **options: Any
    ):
        super().__init__()
        self.order, self.functional = order, functional
        affine = options.pop("affine", True)
        statistics = options.pop("track_running_stats", True)
        momentum = options.pop("momentum", 0.1)
        out = options.pop("out", channels)
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        dilation = options.get("dilation", 1)
        options.setdefault("padding", (dilation * (height // 2), dilation * (width // 2)))
        options.setdefault("bias", False)
        self.conv = nn.Conv2d(channels, out, kernel, **options)
        width = out if "c" in order and order.index("b") > order.index("c") else channels
        self.bn = nn.BatchNorm2d(
            width, affine=affine, track_running_stats=statistics, momentum=momentum, eps=1e-3
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for index, what in enumerate(self.order):
            if what == "c":
                x = self.conv(x)
            elif what == "b":
                x = self.bn(x)
            else:
                x = F.relu(x) if self.functional or index == 0 else self.act(x)
        return x


class SepConv(nn.Module):
    """Twice ReLU, depthwise, pointwise, BatchNorm."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, *, affine: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in (stride, 1):
            layers += [
                nn.ReLU(inplace=False),
                nn.Conv2d(channels, channels, kernel, step, kernel // 2, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels, affine=affine),
            ]
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Two pointwise convolutions of stride 2, the second on the image without its first row and column."""

    def __init__(self, channels: int, out: int | None = None) -> None:
        super().__init__()
        out = channels if out is None else out
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(channels, out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels, out - out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


class MBConv(nn.Module):
    """Inverted residual: expand, depthwise, project; ReLU6."""

    def __init__(self, channels: int, kernel: int, expansion: int, stride: int = 1) -> None:
        super().__init__()
        inner = channels * expansion
        self.residual = stride == 1
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Nothing(nn.Module):
    """Zeros of the size the other candidates have."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class TimesZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0)


class DropPath(nn.Module):
    """Random in training: nothing that a plan could repeat."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.training:
            x = x * (torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) > 0.3)
        return x


def pool_bn(pool: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))


# ----- models


class Cell(nn.Module):
    """Three choices between the same candidates: two read the input, the third one of them."""

    def __init__(
        self, candidates: Callable[[], list[Any]], *, second: Any = None, reduction: Any = "sum"
    ) -> None:
        super().__init__()
        self.one = LayerChoice(candidates(), reduction=reduction)
        self.two = LayerChoice(candidates(), reduction=reduction)
        self.three = LayerChoice((second or candidates)(), reduction=reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.one(x) + self.two(x))


class Single(nn.Module):
    """One choice, after a stem of its own."""

    def __init__(self, candidates: Any, stem: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Identity() if stem is None else stem
        self.op = LayerChoice(candidates, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.stem(x))


class Twice(Single):
    """The same choice called two times."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.op(self.op(self.stem(x))))


class Inputs(nn.Module):
    """Edges whose outputs an InputChoice selects from; `n_chosen` None takes any number."""

    def __init__(self, n_chosen: int | None, reduction: Any = "sum") -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            LayerChoice([Unit("acb", 8), SepConv(8, 3), nn.MaxPool2d(3, 1, 1)]) for _ in range(3)
        )
        self.choose = InputChoice(n_candidates=3, n_chosen=n_chosen, reduction=reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.choose([edge(x) for edge in self.edges])


class SeveralInputsAndOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 5), nn.Identity()])
        self.two = LayerChoice([nn.Sequential(nn.ReLU(), nn.Conv2d(12, 8, 1)), Unit("acb", 12, 1, out=8)])

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = self.one(x), self.two(y)
        return {"a": a, "sum": F.relu(a + b), "both": torch.cat([x, b], 1)}


class Concatenated(nn.Module):
    """Nodes of a cell side by side, as DARTS ends a cell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", channels), SepConv(channels, 3), nn.Identity()])
        self.two = LayerChoice([Unit("acb", channels), nn.AvgPool2d(3, 1, 1, count_include_pad=False)])
        self.after = nn.Sequential(nn.ReLU(), nn.Conv2d(3 * channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(a)
        return self.after(torch.cat([a, b, F.relu(x)], dim=1))


class SharedKeys(nn.Module):
    """Two choices that are decided as one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), Unit("abc", 8, 1)], key="shared")
        self.two = LayerChoice([SepConv(8, 3), nn.MaxPool2d(3, 1, 1)], key="shared")

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) + x


class Around(nn.Module):
    """Layers around choices that are part of the region, and others that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.gate = nn.Mish()
        self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.stem(x))
        return self.head(self.two(self.gate(x)).mean((2, 3)))


def _pair(channels: int, **options: Any) -> Callable[[], list[Any]]:
    return lambda: [Unit("acb", channels, **options), Unit("acb", channels, 1, **options)]


def _darts(channels: int, stride: int = 1) -> list[Any]:
    skip = nn.Identity() if stride == 1 else FactorizedReduce(channels)
    return [
        Nothing(stride),
        pool_bn(nn.MaxPool2d(3, stride, 1), channels),
        pool_bn(nn.AvgPool2d(3, stride, 1, count_include_pad=False), channels),
        skip,
        SepConv(channels, 3, stride, affine=False),
        Unit("acb", channels, 3, stride=stride, dilation=2, affine=False),
    ]


def _pools(channels: int) -> list[Any]:
    return [
        nn.MaxPool2d(2, 1, 1, dilation=1) if channels < 0 else nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d((3, 1), 1, (1, 0), count_include_pad=False),
        Unit("acb", channels),
    ]


def _halves(channels: int) -> list[Any]:
    return [
        nn.MaxPool2d(2),
        nn.AvgPool2d(2, 2),
        nn.AvgPool2d((2, 2), (2, 2), count_include_pad=False),
        nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 2, 2, bias=True)),
    ]


def _orders() -> list[Any]:
    return [
        Unit(order, 8, functional=i % 2 == 0) for i, order in enumerate(("acb", "bac", "cba", "cab", "abc"))
    ]


def _shapes(channels: int) -> list[Any]:
    relu = lambda conv: nn.Sequential(nn.ReLU(), conv)  # noqa: E731
    return [
        relu(nn.Conv2d(channels, channels, 3, padding=1, groups=channels)),
        relu(nn.Conv2d(channels, channels, 1)),
        relu(nn.Conv2d(channels, channels, 5, padding=2, bias=False)),
        relu(nn.Conv2d(channels, channels, (1, 7), padding=(0, 3))),
        nn.Sequential(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)), nn.ReLU(inplace=True)),
        relu(nn.Conv2d(channels, channels, 3, padding=(3, 2), dilation=(3, 2))),
        relu(nn.Conv2d(channels, channels, 5, padding=4, dilation=2, groups=channels, bias=False)),
    ]


def _mobile(channels: int) -> list[Any]:
    return [MBConv(channels, 3, 1), MBConv(channels, 5, 3), nn.Identity()]


def _named() -> Any:
    return OrderedDict(conv=Unit("acb", 8), separable=SepConv(8, 3), skip=nn.Identity())


def _unaffine() -> list[Any]:
    return [Unit("acb", 8, affine=False, track_running_stats=False), Unit("cab", 8, momentum=None, bias=True)]


def _sized(channels: int, height: int, width: int, batch: int) -> Case:
    return Case(
        f"{channels} channels, {height}x{width}, batch {batch}",
        lambda: Cell(lambda: [Unit("acb", channels), SepConv(channels, 3), nn.Identity()]),
        ((channels, height, width),),
        batch,
    )


CASES = (
    Case("orders", lambda: Cell(_orders)),
    Case("norms without weights, statistics or momentum", lambda: Cell(_unaffine)),
    Case("bias", lambda: Cell(_pair(8, bias=True))),
    Case("functional", lambda: Cell(_pair(8, functional=True))),
    Case("stride 2", lambda: Cell(lambda: _darts(32, 2), second=lambda: _darts(32)), ((32, 8, 6),)),
    Case("stride 2, few channels", lambda: Single(_darts(8, 2)), ((8, 8, 6),)),
    Case("stride 2, odd sizes", lambda: Single([_darts(8, 2)[i] for i in (0, 1, 2, 4, 5)]), ((8, 13, 3),)),
    Case("stride 2, even sizes", lambda: Single(_darts(32, 2)), ((32, 6, 4),), 2),
    Case("darts", lambda: Cell(lambda: _darts(16)), ((16, 5, 6),)),
    Case("pools", lambda: Cell(lambda: _pools(8))),
    Case("halves", lambda: Single(_halves(8)), ((8, 6, 4),)),
    Case("halves of odd sizes", lambda: Single(_halves(12)), ((12, 7, 5),)),
    Case("kernels", lambda: Single(_shapes(12), Unit("cba", 12)), ((12, 7, 5),)),
    Case("kernels of 5 channels", lambda: Cell(lambda: _shapes(5)), ((5, 6, 9),), 1),
    Case("one filter", lambda: Cell(lambda: [Unit("acb", 1), nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1))]),
         ((1, 4, 4),)),
    Case("mobile", lambda: Cell(lambda: _mobile(8))),
    Case("mobile, stride 2", lambda: Single([MBConv(12, 3, 6, 2), MBConv(12, 5, 1, 2)]), ((12, 7, 5),)),
    Case("named", lambda: Single(_named())),
    Case("mean", lambda: Cell(_pair(8), reduction="mean")),
    Case("called twice", lambda: Twice([Unit("acb", 8), SepConv(8, 3), nn.Identity()])),
    Case("shared keys", SharedKeys),
    Case("inputs", lambda: Inputs(None)),
    Case("one input", lambda: Inputs(1)),
    Case("mean of inputs", lambda: Inputs(2, "mean")),
    Case("several inputs and outputs", SeveralInputsAndOutputs, ((8, 7, 5), (12, 7, 5))),
    Case("concatenated", lambda: Concatenated(16), ((16, 5, 4),)),
    Case("layers around", Around, ((3, 7, 5),), regions=2),
    Case("stem", lambda: Single([Unit("acb", 16), SepConv(16, 3)], nn.Conv2d(3, 16, 3, 2, 1, bias=False)),
         ((3, 9, 9),), 1),
    Case("dropout in training", lambda: Cell(lambda: [nn.Sequential(Unit("acb", 8), nn.Dropout(0.2)),
         SepConv(8, 3)]), regions=0, evaluated=True, outside="dropout is random"),
    Case("concatenated thirds", lambda: Concatenated(5), ((5, 5, 4),)),
    Case("grouped", lambda: Cell(lambda: [Unit("acb", 8, groups=2), Unit("cba", 8, 1, groups=4, bias=True),
         SepConv(8, 3)])),
    Case("grouped, strides and gaps", lambda: Single([Unit("acb", 20, groups=4, stride=2, out=12),
         FactorizedReduce(20, 12)]), ((20, 6, 4),)),
    Case("many groups", lambda: Cell(lambda: [Unit("acb", 16, groups=16, out=32), Unit("acb", 16, out=32)],
         second=lambda: [Unit("acb", 32), Unit("acb", 32, 1)]), ((16, 5, 4),), outside="16 groups"),
    Case("reflected", lambda: Cell(lambda: [Unit("acb", 8, padding_mode="reflect"), SepConv(8, 3)]),
         regions=0, outside="pads with"),
    Case("times zero", lambda: Cell(lambda: [TimesZero(), Unit("acb", 8)])),
    Case("drop path", lambda: Cell(lambda: [DropPath(Unit("acb", 8)), SepConv(8, 3)]), regions=0,
         evaluated=True, outside="not understood"),
    Case("not understood", lambda: Cell(lambda: [nn.Mish(), Unit("acb", 8)]), regions=0, outside="Mish"),
    Case("mergeable", lambda: Cell(lambda: [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)]), regions=0,
         outside="merged into one layer"),
    *(_sized(*size) for size in ((3, 7, 5, 3), (5, 1, 1, 3), (12, 13, 3, 1), (16, 4, 4, 3), (24, 5, 5, 1),
      (8, 1, 6, 3), (7, 3, 3, 2), (32, 2, 2, 1))),
)  # fmt: skip
