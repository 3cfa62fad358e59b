"""The NAS-Bench-201 space: one cell of six edges (Dong & Yang 2020, arXiv 2001.00326, section 2.1)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.mutables import LayerChoice

CANDIDATES = ("none", "avg_pool_3x3", "conv_3x3", "conv_1x1", "skip_connect")
"""The candidates of an edge, in order."""


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with the three settings that the cell passes down."""

    def __init__(self, channels: int, affine: bool, momentum: float, track_running_stats: bool) -> None:
        super().__init__(channels, affine=affine, momentum=momentum, track_running_stats=track_running_stats)


class ReLUConvBN(nn.Sequential):
    """ReLU, convolution, BatchNorm."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int = 1,
        bn_affine: bool = True,
        bn_momentum: float = 0.1,
        bn_track_running_stats: bool = True,
    ) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, dilation, bias=False),
            BatchNorm(C_out, bn_affine, bn_momentum, bn_track_running_stats),
        )


class Pooling(nn.Sequential):
    """3x3 average pooling (padding does not count); a 1x1 ReLUConvBN before it if the channels change."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        stride: int,
        bn_affine: bool = True,
        bn_momentum: float = 0.1,
        bn_track_running_stats: bool = True,
    ) -> None:
        layers: list[nn.Module] = [nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)]
        if C_in != C_out:
            bn = (bn_affine, bn_momentum, bn_track_running_stats)
            layers.insert(0, ReLUConvBN(C_in, C_out, 1, 1, 0, 1, *bn))
        super().__init__(*layers)


class Zero(nn.Module):
    """Zeros of the shape that the other candidates of the edge return."""

    def __init__(self, C_in: int, C_out: int, stride: int) -> None:
        super().__init__()
        self.C_in = C_in
        self.C_out = C_out
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        strided = torch.zeros_like(x[:, :, :: self.stride, :: self.stride])
        return strided if self.C_in == self.C_out else strided[:, :1].repeat(1, self.C_out, 1, 1)

    def extra_repr(self) -> str:
        return f"C_in={self.C_in}, C_out={self.C_out}, stride={self.stride}"


class FactorizedReduce(nn.Module):
    """The skip connection of an edge that changes the shape, stride 1 or 2: ReLU, 1x1 convolution, BatchNorm.

    With stride 2 it is two convolutions, of half the channels each, the second shifted by one pixel.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        stride: int,
        bn_affine: bool = True,
        bn_momentum: float = 0.1,
        bn_track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        widths = (C_out // 2, C_out - C_out // 2) if stride == 2 else (C_out,)
        self.relu = nn.ReLU()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.convs = nn.ModuleList(nn.Conv2d(C_in, width, 1, stride=stride, bias=False) for width in widths)
        self.bn = BatchNorm(C_out, bn_affine, bn_momentum, bn_track_running_stats)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        parts = [self.convs[0](x)]
        if len(self.convs) == 2:
            # the padding gives the shifted path the same size when height or width is odd
            parts.append(self.convs[1](self.pad(x)[:, :, 1:, 1:]))
        return self.bn(torch.cat(parts, dim=1))


class NASBench201Cell(nn.Module):
    """Four nodes, an edge between each two: (N, C_in, H, W) to (N, C_out, H / stride, W / stride).

    A node is the sum of its edges. Keys `{j}_{i}` for the edge from node j to node i, whatever `cell_id`
    says, so that all cells of a network share one architecture. Only the edges that leave the input have the
    stride and C_in.
    """

    NUM_NODES = 4

    def __init__(
        self,
        cell_id: str | int,
        C_in: int,
        C_out: int,
        stride: int,
        bn_affine: bool = True,
        bn_momentum: float = 0.1,
        bn_track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.cell_id = cell_id
        self.in_dim = C_in
        self.out_dim = C_out
        bn = (bn_affine, bn_momentum, bn_track_running_stats)
        self.layers = nn.ModuleList()
        for i in range(self.NUM_NODES):
            edges = [
                LayerChoice(
                    _edge_candidates(C_in if j == 0 else C_out, C_out, stride if j == 0 else 1, bn),
                    key=f"{j}_{i}",
                    reduction="mean",
                )
                for j in range(i)
            ]
            self.layers.append(nn.ModuleList(edges))

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        edges: Any
        for edges in list(self.layers)[1:]:
            inputs = [edge(node) for edge, node in zip(edges, nodes, strict=True)]
            nodes = [*nodes, sum(inputs[1:], inputs[0])]
        return nodes[-1]


class ResidualBlock(nn.Module):
    """Between the stages: two 3x3 ReLUConvBN, the first of stride 2, beside average pooling and a 1x1."""

    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, 1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, 1)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, stride=2),
            nn.Conv2d(C_in, C_out, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class NASBench201Network(nn.Module):
    """The macro skeleton: images (N, 3, H, W), H and W multiples of 4, to logits (N, n_classes).

    Three stages of `n_cells` cells with `channels`, 2 * channels and 4 * channels, a residual block of stride
    2 between them. The benchmark trains channels=16, n_cells=5 on 32x32 (16x16 for ImageNet16-120).
    """

    def __init__(self, channels: int = 16, n_cells: int = 5, n_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        layers: list[nn.Module] = []
        for stage in range(3):
            width = channels * 2**stage
            if stage > 0:
                layers.append(ResidualBlock(width // 2, width))
            layers.extend(NASBench201Cell(f"stage{stage}_{i}", width, width, 1) for i in range(n_cells))
        self.cells = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.BatchNorm2d(4 * channels), nn.ReLU())
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * channels, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.gap(self.last(self.cells(self.stem(x)))).flatten(1))


def _edge_candidates(
    C_in: int, C_out: int, stride: int, bn: tuple[bool, float, bool]
) -> OrderedDict[str, nn.Module]:
    keeps_shape = stride == 1 and C_in == C_out
    return OrderedDict(
        none=Zero(C_in, C_out, stride),
        avg_pool_3x3=Pooling(C_in, C_out, stride, *bn),
        conv_3x3=ReLUConvBN(C_in, C_out, 3, stride, 1, 1, *bn),
        conv_1x1=ReLUConvBN(C_in, C_out, 1, stride, 0, 1, *bn),
        skip_connect=nn.Identity() if keeps_shape else FactorizedReduce(C_in, C_out, stride, *bn),
    )
