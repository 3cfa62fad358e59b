"""The ENAS macro space: layers with skip connections (Pham et al. 2018, arXiv 1802.03268, section 2.3)."""

from __future__ import annotations

from torch import Tensor, nn

from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.spaces.enas_ops import ConvBranch, FactorizedReduce, PoolBranch


class ENASMacroLayer(MutableScope):
    """One of six operations on the last output, plus any number of skip connections, then BatchNorm.

    `key` names the scope, `prev_labels` the scopes that the skip connections may come from (none for the
    first layer). The two choices get automatic keys. Called with a list of len(prev_labels) + 1 tensors.
    """

    def __init__(self, key: str, prev_labels: list[str], in_filters: int, out_filters: int) -> None:
        super().__init__(key)
        self.in_filters = in_filters
        self.out_filters = out_filters
        self.mutable = LayerChoice(
            [
                ConvBranch(in_filters, out_filters, 3, 1, 1, separable=False),
                ConvBranch(in_filters, out_filters, 3, 1, 1, separable=True),
                ConvBranch(in_filters, out_filters, 5, 1, 2, separable=False),
                ConvBranch(in_filters, out_filters, 5, 1, 2, separable=True),
                PoolBranch("avg", in_filters, out_filters, 3, 1, 1),
                PoolBranch("max", in_filters, out_filters, 3, 1, 1),
            ]
        )
        self.skipconnect = InputChoice(choose_from=prev_labels, n_chosen=None) if prev_labels else None
        self.batch_norm = nn.BatchNorm2d(out_filters, affine=False)

    def forward(self, prev_list: list[Tensor]) -> Tensor:
        out = self.mutable(prev_list[-1])
        if self.skipconnect is not None:
            connection = self.skipconnect(prev_list[:-1])
            if connection is not None:
                out = out + connection
        return self.batch_norm(out)


class ENASMacroGeneralModel(nn.Module):
    """The macro supernet: images (N, in_channels, H, W), H and W multiples of 4, to logits (N, num_classes).

    Height and width are halved after one and two thirds of the layers. As in NNI, one factorized reduction at
    each of these places serves all earlier outputs (the reference implementation of ENAS has one for each
    output), and the scopes are `layer_0`, `layer_1`, ... while the first candidate of every skip connection
    is the stem.
    """

    def __init__(
        self,
        num_layers: int = 12,
        out_filters: int = 24,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.num_classes = num_classes
        self.out_filters = out_filters
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, out_filters, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_filters),
        )
        pool_distance = num_layers // 3
        self.pool_layers_idx = [pool_distance - 1, 2 * pool_distance - 1]
        self.dropout_rate = dropout_rate
        self.dropout = nn.Dropout(dropout_rate)
        labels = [f"layer_{i}" for i in range(num_layers)]
        self.layers = nn.ModuleList(
            ENASMacroLayer(label, labels[:i], out_filters, out_filters) for i, label in enumerate(labels)
        )
        self.pool_layers = nn.ModuleList(
            FactorizedReduce(out_filters, out_filters) for i in range(num_layers) if i in self.pool_layers_idx
        )
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.dense = nn.Linear(out_filters, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.stem(x)]
        for i, layer in enumerate(self.layers):
            outputs = [*outputs, layer(outputs)]
            if i in self.pool_layers_idx:
                pool = self.pool_layers[self.pool_layers_idx.index(i)]
                outputs = [pool(output) for output in outputs]
        return self.dense(self.dropout(self.gap(outputs[-1]).flatten(1)))
