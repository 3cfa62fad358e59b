"""The operations of the two ENAS spaces (Pham et al. 2018, arXiv 1802.03268, sections 2.3 and 2.4).

The order is convolution, BatchNorm, ReLU; BatchNorms have no affine parameters except where stated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nascompile import NascompileError


class StdConv(nn.Module):
    """1x1 convolution, BatchNorm, ReLU: sets the number of channels."""

    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Pool(nn.Module):
    """Pooling, "max" or "avg"; padding does not count in the average."""

    def __init__(self, pool_type: str, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        if pool_type == "max":
            self.pool: nn.Module = nn.MaxPool2d(kernel_size, stride, padding)
        elif pool_type == "avg":
            self.pool = nn.AvgPool2d(kernel_size, stride, padding, count_include_pad=False)
        else:
            raise NascompileError(f'Pool: pool_type is {pool_type!r}, expected "max" or "avg"')

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


class PoolBranch(nn.Module):
    """1x1 convolution block, pooling, BatchNorm: the pooling candidates of the macro space."""

    def __init__(
        self,
        pool_type: str,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.preproc = StdConv(C_in, C_out)
        self.pool = Pool(pool_type, kernel_size, stride, padding)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pool(self.preproc(x)))


class SeparableConv(nn.Module):
    """Depthwise then pointwise convolution, nothing else."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False)
        self.pointwise = nn.Conv2d(C_in, C_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class ConvBranch(nn.Module):
    """1x1 convolution block, (separable) convolution, BatchNorm, ReLU: a candidate of the macro space."""

    def __init__(
        self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, separable: bool
    ) -> None:
        super().__init__()
        self.preproc = StdConv(C_in, C_out)
        if separable:
            self.conv: nn.Module = SeparableConv(C_out, C_out, kernel_size, stride, padding)
        else:
            self.conv = nn.Conv2d(C_out, C_out, kernel_size, stride, padding)
        self.postproc = nn.Sequential(nn.BatchNorm2d(C_out, affine=False), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.postproc(self.conv(self.preproc(x)))


class SepConvBN(nn.Module):
    """ReLU, separable convolution, affine BatchNorm: the convolution candidates of the micro space."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, padding: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = SeparableConv(C_in, C_out, kernel_size, 1, padding)
        self.bn = nn.BatchNorm2d(C_out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.relu(x)))


class FactorizedReduce(nn.Module):
    """Two 1x1 convolutions of stride 2, the second shifted by one pixel, joined, BatchNorm; no ReLU."""

    def __init__(self, C_in: int, C_out: int, affine: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(C_in, C_out - C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], dim=1))


class AuxiliaryHead(nn.Module):
    """The auxiliary classifier of the micro space: (N, C, H, W) to (N, n_classes)."""

    def __init__(self, in_channels: int, n_classes: int) -> None:
        super().__init__()
        self.pooling = nn.Sequential(nn.ReLU(), nn.AvgPool2d(5, 3, 2))
        self.proj = nn.Sequential(StdConv(in_channels, 128), StdConv(128, 768))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(768, n_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gap(self.proj(self.pooling(x))).flatten(1))
