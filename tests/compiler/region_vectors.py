"""Models whose gates are made by linear layers, as people write them; see region_models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.mutables import LayerChoice
from tests.compiler.region_models import Case, Cell, SepConv, Single, Unit

Gated = Callable[[Tensor, nn.Module], Tensor]


def _senet(x: Tensor, fc: nn.Module) -> Tensor:
    b, c, _, _ = x.size()
    y = fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
    return x * y.expand_as(x)


def _views(x: Tensor, fc: nn.Module) -> Tensor:
    y = x.view(x.size(0), x.size(1), -1).mean(-1, keepdim=True).squeeze(2)
    return fc(y).view(-1, x.size(1), 1, 1) * x


def _steps(x: Tensor, fc: nn.Module) -> Tensor:
    y = F.avg_pool2d(x, 1).mean(3).mean(2)
    return x.mul(fc(y * 2 - 0.5).unsqueeze(-1).unsqueeze(-1))


WAYS: dict[str, Gated] = {
    "senet": _senet,
    "views": _views,
    "steps": _steps,
    "mean": lambda x, fc: x * fc(x.mean((2, 3)))[:, :, None, None],
    "torch.mean": lambda x, fc: x * fc(torch.mean(x, dim=[-2, -1]))[..., None, None],
    "flatten": lambda x, fc: x * fc(F.adaptive_avg_pool2d(x, 1).flatten(1)).reshape(x.shape[0], -1, 1, 1),
    "torch.flatten": lambda x, fc: torch.mul(
        x, torch.reshape(fc(torch.flatten(F.relu(F.adaptive_avg_pool2d(x, 1)), start_dim=1)), (-1, 8, 1, 1))
    ),
}


class LinearGate(nn.Module):
    """Squeeze and excitation by two linear layers."""

    def __init__(self, way: str, channels: int = 8) -> None:
        super().__init__()
        has_bias, last = way != "senet", nn.Hardsigmoid() if way == "views" else nn.Sigmoid()
        self.fc = nn.Sequential(
            nn.Linear(channels, 3, bias=has_bias),
            nn.ReLU(inplace=True),
            nn.Dropout(0.0),
            nn.Linear(3, channels, bias=has_bias),
            last,
        )
        self.way, self.flatten = way, nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](x, self.fc)


class Trunk(nn.Module):
    """Gates between choices, and a classifier that no region holds."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 8), SepConv(8, 3)])
        self.gate = LinearGate(way)
        self.two = LayerChoice([nn.Sequential(Unit("acb", 8), LinearGate(way)), SepConv(8, 3)])
        self.flatten, self.head = nn.Flatten(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.gate(self.one(x)))
        return self.head(F.relu(self.flatten(F.adaptive_avg_pool2d(y, 1))))


class LedOut(nn.Module):
    """A vector of which something else is made as well, so that its gate comes from outside of the region."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)]), LayerChoice(_pair())
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        vector = self.fc(y.mean((2, 3)))
        return self.two(y * torch.sigmoid(vector).view(-1, 8, 1, 1)), vector


class Spread(nn.Module):
    """Numbers that are made as large as an image, and not only multiplied with it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)]), LayerChoice(_pair())

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(F.relu(y.mean((2, 3), keepdim=True).expand_as(y)) + y)


class Mixed(nn.Module):
    """An image seen as one of other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)]), LayerChoice(_pair())

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        seen = y.view(y.size(0), x.size(1), x.size(3), x.size(2)).relu()
        return self.two(seen.view(x.size(0), x.size(1), x.size(2), x.size(3)))


class Sizes(nn.Module):
    """Sizes of one part, asked for in another: what is no image does not cross the border between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = LayerChoice([Unit("acb", 8), SepConv(8, 3)]), LayerChoice(_pair())
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        z = self.two(torch.tanh(y))
        return z * self.fc(y.mean((2, 3))).view(z.size(0), z.size(1), 1, 1)


class OnRows(nn.Module):
    """A linear layer over the pixels of each row."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, pixels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class ReluOfCrop(nn.Module):
    """Changes a part of an image in place, and then reads all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.relu = LayerChoice([SepConv(8, 3), Unit("acb", 8)]), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        part = self.relu(y[:, :, 1:])
        return y[:, :, :-1] - part


def _pair() -> list[Any]:
    return [Unit("acb", 8), nn.Sequential(SepConv(8, 3), nn.Hardswish())]


CASES = (
    *(Case(f"linear gate, {way}", lambda way=way: Trunk(way)) for way in WAYS),
    Case("linear gates", lambda: Cell(lambda: [LinearGate("mean"), LinearGate("senet"), Unit("acb", 8)])),
    Case("vector led out", LedOut, regions=2),
    Case("numbers spread", Spread, regions=2),
    Case("image seen otherwise", Mixed, in_parts="is seen as one of"),
    Case("sizes of another part", Sizes, regions=2),
    Case(
        "linear layer on rows",
        lambda: Single([OnRows(5), SepConv(8, 3)]),
        regions=0,
        outside="a linear layer of 5 numbers is not given one number a channel",
    ),
    Case("relu of a crop", ReluOfCrop, regions=0, outside="relu may change getitem in place"),
)
