"""The ENAS micro space: normal and reduction cells (Pham et al. 2018, arXiv 1802.03268, section 2.4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.spaces.enas_ops import AuxiliaryHead, FactorizedReduce, Pool, SepConvBN, StdConv


class ENASMicroCell(nn.Module):
    """Half a node: an earlier output, then one of five operations. Keys `{name}_input` and `{name}_op`."""

    def __init__(self, name: str, prev_labels: list[str], channels: int) -> None:
        super().__init__()
        self.input_choice = InputChoice(
            choose_from=prev_labels, n_chosen=1, return_mask=True, key=f"{name}_input"
        )
        self.op_choice = LayerChoice(
            [
                SepConvBN(channels, channels, 3, 1),
                SepConvBN(channels, channels, 5, 2),
                Pool("avg", 3, 1, 1),
                Pool("max", 3, 1, 1),
                nn.Identity(),
            ],
            key=f"{name}_op",
        )

    def forward(self, previous: list[Tensor]) -> tuple[Tensor, Any]:
        chosen, mask = self.input_choice(previous)
        return self.op_choice(chosen), mask


class ENASMicroNode(MutableScope):
    """A node: the sum of two halves. Returns it with, for each earlier output, whether the node uses it."""

    def __init__(self, name: str, prev_labels: list[str], channels: int) -> None:
        super().__init__(name)
        self.cell_x = ENASMicroCell(f"{name}_x", prev_labels, channels)
        self.cell_y = ENASMicroCell(f"{name}_y", prev_labels, channels)

    def forward(self, previous: list[Tensor]) -> tuple[Tensor, list[bool]]:
        out_x, mask_x = self.cell_x(previous)
        out_y, mask_y = self.cell_y(previous)
        used = [bool(x) or bool(y) for x, y in zip(_as_list(mask_x), _as_list(mask_y), strict=True)]
        return out_x + out_y, used


class ENASMicroLayer(nn.Module):
    """A cell of `num_nodes` nodes: (pprev, prev) to (prev, output of `out_channels` channels).

    With `reduction` both inputs are first reduced to half their height and width and `out_channels` channels;
    the returned prev is then the reduced one. The outputs that no node uses are the output of the cell: ReLU,
    one 1x1 convolution over their concatenation, BatchNorm. That convolution is kept as one convolution for
    each possible input, and those of the unused outputs are summed, which is the same function; a pruned cell
    keeps only these. Keys: `normal_node_{i}_x_input`, `..._x_op`, `..._y_input`, `..._y_op`; `reduce_...`
    with `reduction`.
    """

    def __init__(
        self, num_nodes: int, in_channels_pp: int, in_channels_p: int, out_channels: int, reduction: bool
    ) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.reduction = reduction
        if reduction:
            self.reduce0 = FactorizedReduce(in_channels_pp, out_channels, affine=False)
            self.reduce1 = FactorizedReduce(in_channels_p, out_channels, affine=False)
            in_channels_pp = in_channels_p = out_channels
        self.preproc0 = _calibration(in_channels_pp, out_channels)
        self.preproc1 = _calibration(in_channels_p, out_channels)
        kind = "reduce" if reduction else "normal"
        labels = [InputChoice.NO_KEY, InputChoice.NO_KEY, *(f"{kind}_node_{i}" for i in range(num_nodes))]
        self.nodes = nn.ModuleList(
            ENASMicroNode(labels[i], labels[:i], out_channels) for i in range(2, num_nodes + 2)
        )
        self.final_convs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 1, bias=False) for _ in range(num_nodes + 2)
        )
        self.bn = nn.BatchNorm2d(out_channels, affine=False)

    def forward(self, pprev: Tensor, prev: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduction:
            pprev, prev = self.reduce0(pprev), self.reduce1(prev)
        outputs = [self.preproc0(pprev), self.preproc1(prev)]
        used = [False, False]
        for node in self.nodes:
            output, uses = node(outputs)
            used = [*(before or now for before, now in zip(used, uses, strict=True)), False]
            outputs = [*outputs, output]
        loose = [
            conv(F.relu(output))
            for conv, output, is_used in zip(self.final_convs, outputs, used, strict=True)
            if not is_used
        ]
        return prev, self.bn(sum(loose[1:], loose[0]))


class ENASMicroNetwork(nn.Module):
    """The micro supernet: images (N, in_channels, H, W), H and W multiples of 4, to logits (N, n_classes).

    `n_layers` normal cells in three groups, with a reduction cell (which doubles the channels) between the
    groups; the stem has 3 * channels. With `use_aux` the output in training mode is (logits, auxiliary
    logits).
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 24,
        n_classes: int = 10,
        n_layers: int = 6,
        n_nodes: int = 5,
        use_aux: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 3 * channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(3 * channels),
        )
        reductions = (n_layers // 3, 2 * (n_layers // 3) + 1)
        self.aux_position = reductions[1] if use_aux else -1
        self.layers = nn.ModuleList()
        c_pp = c_p = 3 * channels
        c_cur = channels
        for i in range(n_layers + 2):
            reduction = i in reductions
            if reduction:
                c_cur = 2 * c_cur
            self.layers.append(ENASMicroLayer(n_nodes, c_pp, c_p, c_cur, reduction))
            c_pp, c_p = (c_cur, c_cur) if reduction else (c_p, c_cur)
            if i == self.aux_position:
                self.aux_head = AuxiliaryHead(c_cur, n_classes)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.dense = nn.Linear(c_cur, n_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        prev = cur = self.stem(x)
        aux_logits = None
        for i, layer in enumerate(self.layers):
            prev, cur = layer(prev, cur)
            if i == self.aux_position and self.training:
                aux_logits = self.aux_head(cur)
        logits = self.dense(self.gap(F.relu(cur)).flatten(1))
        return logits if aux_logits is None else (logits, aux_logits)


def _calibration(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Identity() if in_channels == out_channels else StdConv(in_channels, out_channels)


def _as_list(mask: Any) -> list[Any]:
    return mask.tolist() if isinstance(mask, torch.Tensor) else list(mask)
