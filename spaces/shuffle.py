"""The block search space of Single Path One-Shot (Guo et al. 2019, arXiv 1904.00420, section 4 and table 1).

Twenty ShuffleNetV2-like blocks with four candidates each. The blocks follow the authors' released supernet.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from nascompile import NascompileError
from nascompile.mutables import LayerChoice

CANDIDATES = ("choice_3", "choice_5", "choice_7", "choice_x")
"""The candidates of a block: ShuffleNetV2 blocks of kernel size 3, 5, 7, and an Xception-like one."""

STAGE_CHANNELS = (64, 160, 320, 640)
STAGE_BLOCKS = (4, 4, 8, 4)


class ShuffleBlock(nn.Module):
    """A ShuffleNetV2 block: (N, C_in, H, W) to (N, C_out, H / stride, W / stride).

    With stride 1 (and C_in equal to C_out) the channels are shuffled and one half passes unchanged; with
    stride 2 both branches see all channels. `sequence` is the main branch: "p" for pointwise convolution,
    BatchNorm, ReLU; "d" for depthwise convolution, BatchNorm. The hidden width is C_out / 2. `affine` is that
    of the BatchNorms: False in a supernet.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        sequence: str = "pdp",
        affine: bool = False,
    ) -> None:
        super().__init__()
        if stride == 1 and (C_in != C_out or C_in % 4 != 0):
            raise NascompileError(
                f"ShuffleBlock: channels {C_in} to {C_out} with stride 1, expected equal multiples of 4"
            )
        if stride == 2 and C_out <= C_in:
            raise NascompileError(
                f"ShuffleBlock: channels {C_in} to {C_out} with stride 2, expected an increase"
            )
        self.stride = stride
        width = C_in // 2 if stride == 1 else C_in
        self.branch_main = _main_branch(
            width, C_out // 2, C_out - width, kernel_size, stride, sequence, affine
        )
        if stride == 2:
            self.branch_proj = nn.Sequential(
                *_depthwise(width, kernel_size, stride, affine), *_pointwise(width, width, affine)
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], dim=1)
        # shuffle in two groups and split in halves: the even and the odd channels
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], dim=1)


class ShuffleNetSpace(nn.Module):
    """The SPOS supernet: images (N, 3, H, W), H and W multiples of 32, to logits (N, n_classes).

    A stem of stride 2, stages of 4, 4, 8 and 4 blocks (the first of each has stride 2), a 1x1 convolution,
    global average pooling, dropout, a classifier without bias. Keys `stage{s}_block{b}`, from 0. The paper
    trains on 224x224.
    """

    def __init__(
        self,
        n_classes: int = 1000,
        first_channels: int = 16,
        last_channels: int = 1024,
        stage_channels: tuple[int, ...] = STAGE_CHANNELS,
        stage_blocks: tuple[int, ...] = STAGE_BLOCKS,
        dropout_rate: float = 0.1,
        affine: bool = False,
    ) -> None:
        super().__init__()
        if len(stage_channels) != len(stage_blocks):
            raise NascompileError(
                f"ShuffleNetSpace: {len(stage_channels)} stage_channels and {len(stage_blocks)} "
                "stage_blocks, expected as many of one as of the other"
            )
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, first_channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(first_channels, affine=affine),
            nn.ReLU(),
        )
        channels = first_channels
        blocks: list[nn.Module] = []
        for s, (width, n_blocks) in enumerate(zip(stage_channels, stage_blocks, strict=True)):
            for b in range(n_blocks):
                candidates = block_candidates(channels, width, 2 if b == 0 else 1, affine)
                blocks.append(LayerChoice(candidates, key=f"stage{s}_block{b}"))
                channels = width
        self.features = nn.Sequential(*blocks)
        self.conv_last = nn.Sequential(*_pointwise(channels, last_channels, affine))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout_rate)
        self.classifier = nn.Linear(last_channels, n_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gap(self.conv_last(self.features(self.first_conv(x)))).flatten(1)
        return self.classifier(self.dropout(x))


def block_candidates(C_in: int, C_out: int, stride: int, affine: bool = False) -> OrderedDict[str, nn.Module]:
    """The modules of one block by name, in the order of CANDIDATES."""
    return OrderedDict(
        choice_3=ShuffleBlock(C_in, C_out, 3, stride, affine=affine),
        choice_5=ShuffleBlock(C_in, C_out, 5, stride, affine=affine),
        choice_7=ShuffleBlock(C_in, C_out, 7, stride, affine=affine),
        choice_x=ShuffleBlock(C_in, C_out, 3, stride, sequence="dpdpdp", affine=affine),
    )


def _pointwise(C_in: int, C_out: int, affine: bool) -> list[nn.Module]:
    return [nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out, affine=affine), nn.ReLU()]


def _depthwise(channels: int, kernel_size: int, stride: int, affine: bool) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _main_branch(
    C_in: int, C_mid: int, C_out: int, kernel_size: int, stride: int, sequence: str, affine: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = C_in
    last_pointwise = sequence.rindex("p")
    for position, kind in enumerate(sequence):
        if kind == "p":
            width = C_out if position == last_pointwise else C_mid
            layers += _pointwise(channels, width, affine)
            channels = width
        else:
            # the first depthwise convolution carries the stride
            is_first = "d" not in sequence[:position]
            layers += _depthwise(channels, kernel_size, stride if is_first else 1, affine)
    return nn.Sequential(*layers)
