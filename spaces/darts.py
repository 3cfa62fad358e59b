"""The DARTS search space: the cells and the supernet (Liu et al. 2018, arXiv 1806.09055, section 2.1).

The reference implementation has an eighth candidate "none"; as in NNI it is not a module here, the DARTS
mutator gives it a weight of its own.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from nascompile.mutables import InputChoice, LayerChoice
from nascompile.spaces import darts_ops as ops

CANDIDATES = ("maxpool", "avgpool", "skipconnect", "sepconv3x3", "sepconv5x5", "dilconv3x3", "dilconv5x5")
"""The candidates of an edge, in order."""


def edge_candidates(channels: int, stride: int) -> OrderedDict[str, nn.Module]:
    """The modules of one edge by name, in the order of CANDIDATES; none has affine BatchNorm."""
    skip = nn.Identity() if stride == 1 else ops.FactorizedReduce(channels, channels, affine=False)
    return OrderedDict(
        maxpool=ops.PoolBN("max", channels, 3, stride, 1, affine=False),
        avgpool=ops.PoolBN("avg", channels, 3, stride, 1, affine=False),
        skipconnect=skip,
        sepconv3x3=ops.SepConv(channels, channels, 3, stride, 1, affine=False),
        sepconv5x5=ops.SepConv(channels, channels, 5, stride, 2, affine=False),
        dilconv3x3=ops.DilConv(channels, channels, 3, stride, 2, 2, affine=False),
        dilconv5x5=ops.DilConv(channels, channels, 5, stride, 4, 2, affine=False),
    )


class DartsNode(nn.Module):
    """One node: an edge from every earlier node of the cell, of which two are kept, summed.

    Keys: `{node_key}_p{j}` for the edge from node j, `{node_key}_switch` for the choice of edges.
    """

    def __init__(self, node_key: str, n_previous: int, channels: int, n_strided: int) -> None:
        super().__init__()
        keys = [f"{node_key}_p{j}" for j in range(n_previous)]
        self.ops = nn.ModuleList(
            LayerChoice(edge_candidates(channels, stride=2 if j < n_strided else 1), key=key)
            for j, key in enumerate(keys)
        )
        self.drop_path = ops.DropPath()
        self.input_switch = InputChoice(choose_from=keys, n_chosen=2, key=f"{node_key}_switch")

    def forward(self, previous: list[Tensor]) -> Tensor:
        edges = [self.drop_path(edge(x)) for edge, x in zip(self.ops, previous, strict=True)]
        return self.input_switch(edges)


class DartsCell(nn.Module):
    """A normal or reduction cell: (pprev, prev) to the concatenation of its `n_nodes` nodes.

    `channels_pp` and `channels_p` are the channels of the outputs of the last but one and of the last cell,
    `channels` those of each node; with `reduction_p` the last cell was a reduction cell, so pprev has twice
    the height and width of prev. The output has n_nodes * channels channels, and half the height and width
    with `reduction`. Keys: `normal_n{i}_p{j}` and `normal_n{i}_switch` with i from 2 (0 and 1 are the
    inputs), `reduce_...` in reduction cells; all cells of one kind share them.
    """

    def __init__(
        self,
        n_nodes: int,
        channels_pp: int,
        channels_p: int,
        channels: int,
        reduction_p: bool,
        reduction: bool,
    ) -> None:
        super().__init__()
        self.n_nodes = n_nodes
        self.reduction = reduction
        if reduction_p:
            self.preproc0: nn.Module = ops.FactorizedReduce(channels_pp, channels, affine=False)
        else:
            self.preproc0 = ops.StdConv(channels_pp, channels, 1, 1, 0, affine=False)
        self.preproc1 = ops.StdConv(channels_p, channels, 1, 1, 0, affine=False)
        kind = "reduce" if reduction else "normal"
        # only the edges that leave the two inputs have stride 2
        n_strided = 2 if reduction else 0
        self.mutable_ops = nn.ModuleList(
            DartsNode(f"{kind}_n{i}", i, channels, n_strided) for i in range(2, n_nodes + 2)
        )

    def forward(self, pprev: Tensor, prev: Tensor) -> Tensor:
        nodes = [self.preproc0(pprev), self.preproc1(prev)]
        for node in self.mutable_ops:
            # a new list: the node must not see itself
            nodes = [*nodes, node(nodes)]
        return torch.cat(nodes[2:], dim=1)


class DartsNetwork(nn.Module):
    """The DARTS supernet: images (N, in_channels, in_size, in_size) to logits (N, n_classes).

    Cells at one third and two thirds of the `n_layers` are reduction cells and double the channels, which
    start at `channels`; the stem has stem_multiplier * channels. The paper searches CIFAR-10 with
    channels=16, n_layers=8, n_nodes=4. With `auxiliary` the output in training mode is (logits, auxiliary
    logits), and `in_size` must be 32 or 28 (the head needs 8x8 or 7x7). Otherwise `in_size` is not used: any
    multiple of 4 can be fed.
    """

    def __init__(
        self,
        in_size: int,
        in_channels: int,
        channels: int,
        n_classes: int,
        n_layers: int,
        n_nodes: int = 4,
        stem_multiplier: int = 3,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        c_cur = stem_multiplier * channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, c_cur, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c_cur),
        )
        reductions = (n_layers // 3, 2 * n_layers // 3)
        self.aux_position = 2 * n_layers // 3 if auxiliary else -1
        self.cells = nn.ModuleList()
        channels_pp, channels_p, c_cur = c_cur, c_cur, channels
        reduction = False
        for i in range(n_layers):
            reduction_p, reduction = reduction, i in reductions
            c_cur = 2 * c_cur if reduction else c_cur
            self.cells.append(DartsCell(n_nodes, channels_pp, channels_p, c_cur, reduction_p, reduction))
            channels_pp, channels_p = channels_p, c_cur * n_nodes
            if i == self.aux_position:
                self.aux_head = ops.AuxiliaryHead(in_size // 4, channels_p, n_classes)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels_p, n_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pprev = prev = self.stem(x)
        aux_logits = None
        for i, cell in enumerate(self.cells):
            pprev, prev = prev, cell(pprev, prev)
            if i == self.aux_position and self.training:
                aux_logits = self.aux_head(prev)
        logits = self.linear(self.gap(prev).flatten(1))
        return logits if aux_logits is None else (logits, aux_logits)

    def drop_path_prob(self, p: float) -> None:
        """Set the probability of every DropPath, in place."""
        for module in self.modules():
            if isinstance(module, ops.DropPath):
                module.p = p
