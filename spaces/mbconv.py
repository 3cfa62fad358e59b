"""The ProxylessNAS space of inverted residual blocks (Cai et al. 2018, arXiv 1812.00332, section 4.2).

The block is that of MobileNetV2 (Sandler et al. 2018); FBNet (Wu et al. 2018, arXiv 1812.03443, table 1)
searches the same kind of block with other widths, which can be given as `stages`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from nascompile import NascompileError
from nascompile.mutables import LayerChoice

CANDIDATES = tuple((kernel_size, expansion) for kernel_size in (3, 5, 7) for expansion in (3, 6))
"""(kernel size, expansion) of the six convolving candidates, named `mb{expansion}_{k}x{k}`, in order."""


class Stage(NamedTuple):
    """`n_blocks` blocks of `channels` channels; the first has the stride."""

    channels: int
    n_blocks: int
    stride: int


IMAGENET_STAGES = (
    Stage(24, 4, 2),
    Stage(40, 4, 2),
    Stage(80, 4, 2),
    Stage(96, 4, 1),
    Stage(192, 4, 2),
    Stage(320, 1, 1),
)
"""The 21 blocks of the paper; with the stem of stride 2, 224x224 becomes 7x7."""

CIFAR_STAGES = (
    Stage(24, 4, 1),
    Stage(40, 4, 2),
    Stage(80, 4, 2),
    Stage(96, 4, 1),
    Stage(192, 4, 2),
    Stage(320, 1, 1),
)
"""The same blocks with the first reduction taken out (the stem has stride 1 too): 32x32 becomes 4x4.

This is the common adaptation of mobile networks to CIFAR. The paper's own CIFAR-10 experiment (section 4.1)
searches a tree-structured PyramidNet, which is another space.
"""


class ConvBNReLU6(nn.Sequential):
    """Convolution (same padding), BatchNorm with eps 1e-3, ReLU6."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(C_in, C_out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(C_out, eps=1e-3),
            nn.ReLU6(),
        )


class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion (if `expansion` > 1), k x k depthwise, linear 1x1 projection.

    With `residual` the input is added to the output.
    """

    def __init__(
        self, C_in: int, C_out: int, kernel_size: int, stride: int, expansion: int, residual: bool = False
    ) -> None:
        super().__init__()
        if residual and (stride != 1 or C_in != C_out):
            raise NascompileError(
                f"MBConv: residual with stride {stride} and channels {C_in} to {C_out}, "
                "expected stride 1 and equal channels"
            )
        hidden = C_in * expansion
        layers: list[nn.Module] = [ConvBNReLU6(C_in, hidden, 1)] if expansion > 1 else []
        layers += [
            ConvBNReLU6(hidden, hidden, kernel_size, stride, groups=hidden),
            nn.Conv2d(hidden, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, eps=1e-3),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + out if self.residual else out


def block_candidates(C_in: int, C_out: int, stride: int) -> OrderedDict[str, nn.Module]:
    """The six MBConv candidates by name, and "skip" where the block keeps its shape.

    The paper has a residual around the choice and "Zero" in it. Here the residual is inside each candidate
    and the zero is the identity: the same function for weights that sum to 1, and a pruned block leaves
    nothing behind.
    """
    keeps_shape = stride == 1 and C_in == C_out
    candidates: OrderedDict[str, nn.Module] = OrderedDict(
        (f"mb{expansion}_{k}x{k}", MBConv(C_in, C_out, k, stride, expansion, residual=keeps_shape))
        for k, expansion in CANDIDATES
    )
    if keeps_shape:
        candidates["skip"] = nn.Identity()
    return candidates


class MBConvNetwork(nn.Module):
    """The supernet: images (N, 3, H, W) to logits (N, n_classes).

    A 3x3 stem of 32 channels and `stem_stride`, a fixed MBConv of 16 channels, the blocks of `stages`, a 1x1
    convolution to 1280 channels, global average pooling, dropout and the classifier. Keys
    `stage{s}_block{b}`, from 0. `imagenet` and `cifar` make the two settings.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        stages: Sequence[Stage],
        stem_stride: int,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not stages:
            raise NascompileError("MBConvNetwork: stages is empty, expected at least one Stage")
        self.stem = nn.Sequential(ConvBNReLU6(3, 32, 3, stem_stride), MBConv(32, 16, 3, 1, expansion=1))
        channels = 16
        blocks: list[nn.Module] = []
        for s, stage in enumerate(stages):
            for b in range(stage.n_blocks):
                stride = stage.stride if b == 0 else 1
                candidates = block_candidates(channels, stage.channels, stride)
                blocks.append(LayerChoice(candidates, key=f"stage{s}_block{b}"))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.feature_mix = ConvBNReLU6(channels, 1280, 1)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout_rate)
        self.classifier = nn.Linear(1280, n_classes)

    @classmethod
    def imagenet(cls, n_classes: int = 1000, dropout_rate: float = 0.0) -> MBConvNetwork:
        """The paper's 21 blocks for 224x224 images (any multiple of 32)."""
        return cls(n_classes, stages=IMAGENET_STAGES, stem_stride=2, dropout_rate=dropout_rate)

    @classmethod
    def cifar(cls, n_classes: int = 10, dropout_rate: float = 0.0) -> MBConvNetwork:
        """The same blocks for 32x32 images (any multiple of 8)."""
        return cls(n_classes, stages=CIFAR_STAGES, stem_stride=1, dropout_rate=dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gap(self.feature_mix(self.blocks(self.stem(x)))).flatten(1)
        return self.classifier(self.dropout(x))
