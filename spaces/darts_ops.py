"""The operations of the DARTS cell (Liu et al. 2018, arXiv 1806.09055, section 3.1 and appendix A.1).

Every operation that convolves has the order ReLU, convolution, BatchNorm; inside a supernet the BatchNorms
have no affine parameters, so that the scale of a candidate is decided by its architecture weight alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile import NascompileError


class DropPath(nn.Module):
    """Drop whole samples of an edge with probability `p` while training, and scale the others by 1 / (1 - p).

    From FractalNet (Larsson et al. 2016), as DARTS uses it for the final training; `p` is 0 during search. An
    edge that carries nothing (None) stays None.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor | None) -> Tensor | None:
        if x is None or not self.training or self.p <= 0.0:
            return x
        return x * F.dropout(torch.ones_like(x[:, :1, :1, :1]), self.p, training=True)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class PoolBN(nn.Sequential):
    """Pooling, "max" or "avg" (padding does not count in the average), then BatchNorm."""

    def __init__(
        self, pool_type: str, C: int, kernel_size: int, stride: int, padding: int, affine: bool = True
    ) -> None:
        pool: nn.Module
        if pool_type == "max":
            pool = nn.MaxPool2d(kernel_size, stride, padding)
        elif pool_type == "avg":
            pool = nn.AvgPool2d(kernel_size, stride, padding, count_include_pad=False)
        else:
            raise NascompileError(f'PoolBN: pool_type is {pool_type!r}, expected "max" or "avg"')
        super().__init__(pool, nn.BatchNorm2d(C, affine=affine))


class StdConv(nn.Sequential):
    """ReLU, convolution, BatchNorm."""

    def __init__(
        self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True
    ) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


ReLUConvBN = StdConv
"""The name of StdConv in the reference implementation of DARTS."""


class FacConv(nn.Sequential):
    """ReLU, a k x 1 and a 1 x k convolution, BatchNorm. Each axis is padded and strided once."""

    def __init__(
        self, C_in: int, C_out: int, kernel_length: int, stride: int, padding: int, affine: bool = True
    ) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, (kernel_length, 1), (stride, 1), (padding, 0), bias=False),
            nn.Conv2d(C_in, C_out, (1, kernel_length), (1, stride), (0, padding), bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class DilConv(nn.Sequential):
    """ReLU, dilated depthwise convolution, pointwise convolution, BatchNorm."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int,
        affine: bool = True,
    ) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation=dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class SepConv(nn.Sequential):
    """Two depthwise separable convolutions in a row; the first has the stride (as in NASNet and DARTS)."""

    def __init__(
        self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True
    ) -> None:
        super().__init__(
            DilConv(C_in, C_in, kernel_size, stride, padding, dilation=1, affine=affine),
            DilConv(C_in, C_out, kernel_size, 1, padding, dilation=1, affine=affine),
        )


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2, the second shifted by one pixel, concatenation, BatchNorm.

    Height and width must be even, as in the reference implementation.
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(C_in, C_out - C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], dim=1))


class AuxiliaryHead(nn.Module):
    """The auxiliary classifier: (N, C, s, s) to (N, n_classes), where s = `input_size` is 7 or 8."""

    def __init__(self, input_size: int, C: int, n_classes: int) -> None:
        super().__init__()
        if input_size not in (7, 8):
            raise NascompileError(
                f"AuxiliaryHead: input_size is {input_size}, expected 7 (ImageNet) or 8 (CIFAR)"
            )
        self.net = nn.Sequential(
            nn.ReLU(),
            # 8x8 with stride 3 and 7x7 with stride 2 both give 2x2
            nn.AvgPool2d(5, stride=input_size - 5, padding=0, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.linear = nn.Linear(768, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.net(x).flatten(1))
