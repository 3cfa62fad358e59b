"""Layers that candidates are made of, and how many weights each has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 4  # channels everywhere, so that any two values can be added


class Separable(nn.Module):
    """ReLU, depthwise, 1x1, BatchNorm, with the functional ReLU that users write."""

    def __init__(self, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.depthwise = nn.Conv2d(C, C, kernel, padding=padding, dilation=dilation, groups=C, bias=False)
        self.pointwise = nn.Conv2d(C, C, 1, bias=False)
        self.bn = nn.BatchNorm2d(C, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(F.relu(x))))


class Zero(nn.Module):
    """DARTS's "none"."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0)


class SqueezeExcite(nn.Module):
    """Uses its input twice, and reads a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.gate(x.mean((2, 3))))
        return x * scale.view(x.size(0), C, 1, 1)


class Scale(nn.Module):
    """A parameter of its own, and a buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((C, 1, 1), 0.5))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.factor, 0.5)
        self.calls.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.factor


class DropPath(nn.Module):
    """Python branches on an attribute and on the mode; random numbers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.probability = 0.3

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.probability > 0:
            keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device) >= self.probability
            x = x * keep / (1 - self.probability)
        return F.dropout(x + 0.25, 0.2, training=self.training)


def _conv_bn(relu: nn.Module) -> nn.Sequential:
    return nn.Sequential(relu, nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))


LAYERS: dict[str, Any] = {
    "conv1": lambda: nn.Conv2d(C, C, 1, bias=False),
    "conv3": lambda: nn.Conv2d(C, C, 3, padding=1),
    "relu_conv_bn": lambda: _conv_bn(nn.ReLU()),
    "relu_conv_bn_": lambda: _conv_bn(nn.ReLU(inplace=True)),
    "separable3": lambda: Separable(3),
    "dilated5": lambda: Separable(5, 2),
    "max_pool": lambda: nn.MaxPool2d(3, 1, 1),
    "avg_pool_bn": lambda: nn.Sequential(
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(C, affine=False)
    ),
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "dropout": lambda: nn.Dropout(0.3),
    "bn": lambda: nn.BatchNorm2d(C),
    "zero": Zero,
    "squeeze": SqueezeExcite,
    "scale": Scale,
    "drop_path": DropPath,
}
# counted by hand: weights and biases of each layer
PARAMETERS = {
    "conv1": 16, "conv3": 148, "relu_conv_bn": 152, "relu_conv_bn_": 152, "separable3": 52, "dilated5": 116,
    "max_pool": 0, "avg_pool_bn": 0, "identity": 0, "relu": 0, "relu_": 0, "gelu": 0, "dropout": 0, "bn": 8,
    "zero": 0, "squeeze": 20, "scale": 4, "drop_path": 0, "stem": 148, "side": 16, "head": 15,
}  # fmt: skip
IN_PLACE = frozenset({"relu_"})  # gives its input back, changed
