"""Models with activations, gates, paddings, crops and functional forms, as people write them; see
region_models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.mutables import LayerChoice
from tests.compiler.region_models import Case, Cell, SepConv, Single, Unit

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "leaky": nn.LeakyReLU,
    "elu": nn.ELU,
    "prelu": nn.PReLU,
    "prelu by channel": lambda: nn.PReLU(8),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": lambda x: F.relu(x, inplace=True),
    "F.hardswish": lambda x: F.hardswish(x, True),
    "F.hardsigmoid": F.hardsigmoid,
    "F.silu": F.silu,
    "torch.sigmoid": torch.sigmoid,
    "x.sigmoid()": lambda x: x.sigmoid(),
    "F.gelu": F.gelu,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "F.elu": lambda x: F.elu(x, alpha=1.0),
    "swish": lambda x: x * torch.sigmoid(x),
    "hand-made swish": lambda x: torch.mul(x, other=x.sigmoid()),
    "hand-made hardswish": lambda x: x * F.relu6(x + 3.0, inplace=True) / 6,
    "hand-made hardsigmoid": lambda x: F.relu6(3 + x).div(6),
}


class Acted(nn.Module):
    """An activation before and behind a convolution, of a sum, and of what a BatchNorm gives."""

    def __init__(self, act: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.act = act
        self.first, self.second = Unit("cb", channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(x)))
        return self.bn(self.act(y + self.first(y))) + self.act(self.bn(x))


class SqueezeExcite(nn.Module):
    """x times a number a channel that two 1x1 convolutions make of its mean; `how`: the ways to write it."""

    def __init__(self, channels: int, how: str) -> None:
        super().__init__()
        self.how, hidden = how, max(channels // 4, 2)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.bn = nn.BatchNorm2d(hidden) if how == "norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "mean":
                pooled = x.mean((2, 3), keepdim=True)
            case "functional":
                pooled = F.adaptive_avg_pool2d(x, 1)
            case "torch":
                pooled = torch.mean(x, dim=[-1, -2], keepdim=True)
            case _:
                pooled = self.pool(x)
        hidden = F.relu(self.bn(self.reduce(pooled)))
        if self.how == "norm":
            return self.expand(hidden).sigmoid() * x
        scale = F.hardsigmoid(self.expand(hidden), inplace=True)
        if self.how == "torch":
            return torch.mul(x, scale)
        return x.mul(scale) if self.how == "functional" else x * scale


class MobileBlock(nn.Module):
    """MBConv of MobileNetV3: expand, depthwise, squeeze and excite, project."""

    def __init__(self, channels: int, kernel: int, act: Callable[[], nn.Module], how: str, stride: int = 1):
        super().__init__()
        inner = channels * 2
        self.residual = stride == 1
        self.body = nn.Sequential(
            Unit("cb", channels, 1, out=inner),
            act(),
            Unit("cb", inner, kernel, stride=stride, groups=inner),
            act(),
            SqueezeExcite(inner, how),
            Unit("cb", inner, 1, out=channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.residual:
            out += x
        return out


def _mobiles(channels: int, stride: int = 1) -> list[Any]:
    return [
        MobileBlock(channels, 3, nn.ReLU, "norm", stride),
        MobileBlock(channels, 5, lambda: nn.Hardswish(inplace=True), "mean", stride),
        MobileBlock(channels, 3, lambda: nn.SiLU(inplace=True), "functional", stride),
        MobileBlock(channels, 5, nn.ReLU6, "torch", stride),
    ]


class Excited(nn.Module):
    """Gates around choices: of a sum, of a concatenation, of an image by itself, of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 5), SepConv(5, 3)])
        self.gate = LayerChoice([nn.Conv2d(5, 10, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 10, 1))])
        self.bn, self.last = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        both = torch.cat([y, x * y], 1)
        pooled = F.adaptive_avg_pool2d(both[:, 3:8], (1, 1))
        gate = torch.sigmoid(self.gate(pooled))
        gated = self.bn(both * gate)
        return self.last(gated * gated) * (pooled * pooled)


class Spatial(nn.Module):
    """Gates of one channel: a map, a number a sample, and one that is multiplied by a number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Unit("cb", 10), LayerChoice([Unit("acb", 10), SepConv(10, 3)])
        self.map, self.number = nn.Conv2d(10, 1, 3, padding=1), nn.Conv2d(10, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x)[:, :3], self.two(x)[:, :7]], 1)
        place, pixel = torch.sigmoid(self.map(y)), F.adaptive_avg_pool2d(y, 1)
        y = place * y + y * self.number(pixel).sigmoid()
        return y + (place * pixel) * (place * place)


class Scaled(nn.Module):
    """Images times numbers, and plus numbers, at the places where a plan could leave them out."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        nothing = x[:, :, :: self.stride, :: self.stride].mul(0.0)
        y = self.conv(2 * x + 1) - 0.5
        y = self.last(F.relu(-self.bn(y / 3))) - (1 - x)
        y = self.bn(y.sub(x).mul(0.25).add(2))
        y -= 1
        y /= 4
        return torch.div(y, 2) * 3 + nothing


class Kept(Cell):
    """A path that is dropped, as DARTS drops it: divided and multiplied in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.dropped(self.one(x)) + self.two(x))

    def dropped(self, x: Tensor) -> Tensor:
        if self.training:
            kept = torch.bernoulli(torch.full((x.size(0), 1, 1, 1), 0.7, dtype=x.dtype))
            x = x.div(0.7)
            x.mul_(kept)
        return x


class OnceForAll(nn.Module):
    """Squeeze and excitation of OFA: means one after the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x.mean(3, keepdim=True).mean(2, keepdim=True)))
        return x * (F.relu6(self.second(y) + 3.0) / 6.0)


class Padded(nn.Module):
    """Paddings that a convolution does not have, crops that it does not read in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.same = nn.Conv2d(8, 8, (4, 3), padding="same", dilation=(1, 2), bias=False)
        self.even = nn.Conv2d(8, 8, 3, padding="same")
        self.valid = nn.Conv2d(8, 8, 3, padding="valid")
        self.zeros, self.bn = nn.ZeroPad2d((1, 1, 2, 0)), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "same":
                return self.bn(self.same(F.relu(self.even(x))))
            case "zeros":
                return self.valid(self.zeros(F.relu(x)))
            case "functional":
                y = F.max_pool2d(F.pad(x, (1, 1, 0, 2)), 3, 1)
                return y + F.avg_pool2d(x, 3, stride=1, padding=(1, 1), count_include_pad=False)
            case "dropout":
                y = F.dropout(F.avg_pool2d(x, (3, 1), 1, (1, 0)), 0.3, training=False)
                return F.max_pool2d(y, kernel_size=(1, 3), stride=1, padding=(0, 1)) + x
            case "crops":
                y = self.bn(F.pad(x, (0, 1, 2, 0))[:, :, 1:-1, :-1])
                return F.pad(self.even(x[:, :, 1:, 1:]), [1, 0, 1, 0]) + F.pad(y, (0, 0, 1, 0))[:, :, :-1]
            case "steps":
                y = torch.cat([x[:, :, ::2, 1::2], F.relu(x)[:, :, 1::2, ::2][:, :, :, :2]], 1)
                return F.pad(self.bn(y[:, 4:12]), (0, 3, 3, 0))
            case _:
                raise AssertionError(self.how)


class Broadcast(nn.Module):
    """What only its sizes rule out, between choices: found when a plan is made, it parts the region."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)]), LayerChoice(_pair())
        self.bias = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 8, 1, 1))
        self.register_buffer("signs", torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        match self.how:
            case "signs":
                y = y * self.get_buffer("signs")[:1]
            case "number a sample":
                y = y * self.get_buffer("signs").abs()
            case "number a channel":
                y = y + self.bias.expand(1, -1, -1, -1)
            case "map":
                y = F.relu(y + y.amax(1, keepdim=True))
            case "pixel":
                y = y + F.adaptive_avg_pool2d(y, 1)
            case "large window":
                y = torch.cat([y, F.max_pool2d(F.pad(y, (8, 8, 8, 8)), 17, 1)], 1)[:, ::2]
            case _:
                raise AssertionError(self.how)
        return self.two(y)


def _pair() -> list[Any]:
    return [Unit("acb", 8), nn.Sequential(SepConv(8, 3), nn.Hardswish())]


class Residual(nn.Module):
    """A block of ResNet: the sum is made in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = Unit("cba", 8), Unit("cb", 8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.second(self.first(x))
        out += identity
        out *= identity.sigmoid()
        return self.act(out)


class InPlace(Cell):
    """In-place arithmetic around choices."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) + x
        y += x
        y *= self.two(x)
        return self.three(y.relu_())


CASES = (
    *(
        Case(name, lambda make=make: Cell(lambda: [Acted(make()), SepConv(8, 3), make()]))
        for name, make in ACTIVATIONS.items()
    ),
    *(
        Case(name, lambda act=act: Single([Acted(act, 5), SepConv(5, 3)]), ((5, 4, 6),))
        for name, act in FUNCTIONS.items()
    ),
    Case("mobile blocks", lambda: Cell(lambda: _mobiles(8)), ((8, 5, 4),)),
    Case("mobile blocks, stride 2", lambda: Single(_mobiles(6, 2)), ((6, 9, 7),)),
    Case("numbers", lambda: Cell(lambda: [Scaled(), Unit("acb", 8)])),
    Case(
        "numbers that batch statistics follow",
        lambda: Cell(lambda: [nn.Sequential(Scaled(), Unit("bac", 8)), OnceForAll(8)]),
    ),
    Case("dropped path", lambda: Kept(lambda: [Unit("acb", 8), SepConv(8, 3)]), regions=3, evaluated=True),
    Case("gates", Excited, ((5, 7, 3),)),
    Case("gates of one channel", Spatial, ((10, 5, 4),)),
    *(
        Case(f"padding, {how}", lambda how=how: Cell(lambda: [Padded(how), Unit("acb", 8)]), ((8, 6, 5),))
        for how in ("same", "zeros", "functional", "dropout", "crops", "steps")
    ),
    Case("number a sample", lambda: Broadcast("number a sample")),
    Case("signs", lambda: Broadcast("signs"), in_parts="not an image of the batch"),
    Case("number a channel", lambda: Broadcast("number a channel"), in_parts="not an image of the batch"),
    Case("map", lambda: Broadcast("map"), regions=2, in_parts="a sum broadcasts"),
    Case("pixel", lambda: Broadcast("pixel"), in_parts="a sum broadcasts"),
    Case("large window", lambda: Broadcast("large window"), in_parts="too large"),
    Case(
        "replicated",
        lambda: Cell(
            lambda: [nn.Sequential(nn.ReplicationPad2d(1), Unit("acb", 8, padding=0)), SepConv(8, 3)]
        ),
        regions=0,
        outside="ReplicationPad2d is not understood",
    ),
    Case(
        "group norm",
        lambda: Cell(lambda: [nn.Sequential(Unit("acb", 8), nn.GroupNorm(2, 8)), SepConv(8, 3)]),
        regions=0,
        outside="GroupNorm is not understood",
    ),
    Case("residual", lambda: Cell(lambda: [Residual(), Unit("acb", 8)])),
    Case("in place", lambda: InPlace(lambda: [Unit("acb", 8), SepConv(8, 3)])),
)
