"""Search a small network that reads handwritten digits:

    nascompile examples/digits.py --epochs 12 --retrain 30

The data are the 1,797 digits of 8x8 pixels that come with scikit-learn, so nothing is downloaded. The classes
are
ordinary PyTorch with some choices left open; the names at the end of the file are what the command line looks
for.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from nascompile.mutables import InputChoice, LayerChoice

try:
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("this example needs scikit-learn; install it with: pip install scikit-learn") from None


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out), nn.ReLU())


def layers(channels: int) -> OrderedDict[str, nn.Module]:
    """The candidates for one open layer. All of them keep the shape, so that their outputs can be added
    up."""
    return OrderedDict(
        conv1x1=conv(channels, channels, 1),
        conv3x3=conv(channels, channels, 3),
        depthwise5x5=conv(channels, channels, 5, groups=channels),
        maxpool=nn.MaxPool2d(3, stride=1, padding=1),
        skip=nn.Identity(),
    )


class Node(nn.Module):
    """Sees all earlier results, each through an open layer, and goes on with one of them."""

    def __init__(self, name: str, n_earlier: int, channels: int) -> None:
        super().__init__()
        keys = [f"{name}/from{i}" for i in range(n_earlier)]
        self.edges = nn.ModuleList(LayerChoice(layers(channels), key=key) for key in keys)
        self.pick = InputChoice(choose_from=keys, n_chosen=1, key=f"{name}/pick")

    def forward(self, earlier: list[torch.Tensor]) -> torch.Tensor:
        return self.pick([edge(x) for edge, x in zip(self.edges, earlier, strict=True)])


class Cell(nn.Module):
    """Three nodes; the result is all of theirs. Cells use the same keys, so one decision holds for all of
    them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(Node(f"node{n}", n, channels) for n in (1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [x]
        for node in self.nodes:
            results.append(node(results))
        return torch.cat(results[1:], dim=1)


class Digits(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = conv(1, channels, 3)
        self.cell1 = Cell(channels)
        self.shrink = conv(3 * channels, channels, 3, stride=2)
        self.cell2 = Cell(channels)
        self.head = nn.Linear(3 * channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cell2(self.shrink(self.cell1(self.stem(x))))
        return self.head(x.mean((2, 3)))


def accuracy(logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    return {"accuracy": (logits.argmax(dim=1) == target).float().mean().item()}


images, labels = load_digits(return_X_y=True)
digits = TensorDataset(
    torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
    torch.tensor(labels, dtype=torch.int64),
)
# a fixed order, so that the test digits are the same in every run and never seen before the end
order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0)).tolist()

model = Digits
dataset_train = Subset(digits, order[:1097])
dataset_valid = Subset(digits, order[1097:1397])
dataset_test = Subset(digits, order[1397:])
loss = nn.CrossEntropyLoss()
metrics = accuracy


def optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


# a short search has to move its decisions faster than the long ones of the papers
search_options = {"darts": {"arc_learning_rate": 0.02}, "enas": {"child_steps": 20, "mutator_steps": 10}}
