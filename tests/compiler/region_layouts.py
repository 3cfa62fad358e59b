"""Models that concatenate images whose channels end inside a vector, and what is then done with them; see
region_models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.mutables import LayerChoice
from tests.compiler.region_models import Case, Cell, FactorizedReduce, Nothing, SepConv, Single, Unit


class Split(nn.Module):
    """Two convolutions side by side (5 and 3 channels of 8, say), then what the case is about."""

    def __init__(self, channels: int, *, momentum: float | None = 0.1, how: str = "norm") -> None:
        super().__init__()
        self.how, first = how, channels - 3
        self.one = nn.Conv2d(channels, first, 3, padding=1)
        self.two = nn.Conv2d(channels, channels - first, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels, momentum=momentum)
        self.last = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x), self.two(x)], 1)
        match self.how:
            case "norm":
                return F.relu(self.bn(y))
            case "norm of activation":
                return self.bn(F.relu(y)) + x
            case "sum":
                return self.dense(F.relu(y + x))
            case "depthwise":
                return self.last(F.relu(y)) + y
            case "channels":
                return self.dense(torch.cat([y[:, 1::2], y[:, ::2]], 1)) + y
            case "shared weights":
                return self.dense(y) + self.dense(x)
            case "shared depthwise weights":
                return self.last(x) + self.last(y)
            case "twice":
                both = torch.cat([y, F.relu(y), y], 1)
                return both[:, :8] + F.relu(torch.cat([y, y], 1))[:, 5:13] + both[:, 15:23]
            case "zeros":
                return self.dense(torch.cat([torch.zeros_like(y)[:, :3], F.relu(y)[:, 3:]], 1))
            case _:
                raise AssertionError(self.how)


class Pools(nn.Module):
    """Pools, crops and choices between images in several layouts; gives one that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = [Unit("acb", 6), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Identity()]
        self.one = LayerChoice([*layers, nn.BatchNorm2d(6), Nothing()])
        self.two = LayerChoice([Unit("acb", 3, 3, stride=2), SepConv(3, 3, 2)])
        self.after = LayerChoice([Unit("acb", 9), nn.Sequential(nn.ReLU(), nn.Conv2d(9, 9, 1))])
        self.odd = nn.Conv2d(6, 6, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        both = self.one(torch.cat([x, F.relu(x)], 1))
        smaller = torch.cat([self.odd(both[:, :, 1:, 1:]), self.two(x)], 1)
        return torch.cat([self.after(smaller), smaller, self.two(x)], 1)


def _split(how: str, **options: Any) -> Case:
    momentum = options.pop("momentum", 0.1)
    return Case(
        f"split, {how}, momentum {momentum}",
        lambda: Cell(lambda: [Split(8, how=how, momentum=momentum), SepConv(8, 3), nn.Identity()]),
    )


CASES = (
    _split("norm"),
    _split("norm", momentum=None),
    _split("norm of activation"),
    _split("sum"),
    _split("depthwise"),
    _split("channels"),
    _split("shared weights"),
    _split("shared depthwise weights"),
    _split("twice"),
    _split("zeros"),
    Case("pools of concatenations", Pools, ((3, 8, 6),)),
    Case("factorized, 20 channels", lambda: Single([FactorizedReduce(20), SepConv(20, 3, 2)]), ((20, 6, 4),)),
)
