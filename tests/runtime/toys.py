"""Small search spaces, data and trainers that the runtime tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from nascompile.mutables import InputChoice, LayerChoice
from nascompile.runtime.darts import DartsTrainer
from nascompile.runtime.enas import EnasTrainer
from nascompile.runtime.random_search import RandomTrainer
from nascompile.runtime.trainer import Trainer

FEATURES = 6
CLASSES = 3


class Net(nn.Module):
    """Two choices with BatchNorm and dropout, a skip, and a choice of inputs by source."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.first = LayerChoice([_block(dropout), nn.Linear(FEATURES, 8)], key="cell.first")
        self.second = LayerChoice([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Identity()])
        self.skip = InputChoice(n_candidates=1, key="skip")
        self.switch = InputChoice(choose_from=[self.first.key, self.second.key], n_chosen=1, key="switch")
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        skipped = self.skip([a])
        if skipped is not None:
            b = b + skipped
        return self.head(self.switch([a, b]))


def _block(dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout))


class Blind(nn.Module):
    """A candidate that sees nothing of its input, but has the parameters and the shape of a good one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.zeros_like(x))


class Planted(nn.Module):
    """Only candidate "good" sees the input."""

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([Blind(), Blind(), nn.Linear(FEATURES, 8), Blind()], key="op")
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(x))


def data(size: int = 96, seed: int = 0) -> TensorDataset:
    """Examples that a linear map can separate."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """The share of right answers."""
    return (logits.argmax(1) == target).float().mean()


def named_accuracy(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The accuracy as a metric."""
    return {"acc": accuracy(logits, target)}


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    """Momentum and weight decay on purpose: both move a parameter without a gradient of its own."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-2)


def make(kind: str, model: nn.Module | None = None, **overrides: Any) -> Trainer:
    """A small trainer by name: "darts", "unrolled", "enas" or "random"."""
    model = Net() if model is None else model
    arguments: dict[str, Any] = {
        "model": model,
        "loss": nn.functional.cross_entropy,
        "metrics": named_accuracy,
        "optimizer": sgd(model),
        "num_epochs": 2,
        "dataset_train": data(),
        "dataset_valid": data(32, seed=1),
        "batch_size": 16,
        "workers": 0,
        "device": "cpu",
        "compile": False,
    }
    makers: dict[str, tuple[Callable[..., Trainer], dict[str, Any]]] = {
        "darts": (DartsTrainer, {"arc_learning_rate": 0.02}),
        "unrolled": (DartsTrainer, {"arc_learning_rate": 0.02, "unrolled": True}),
        "enas": (
            EnasTrainer,
            {
                "reward_function": accuracy,
                "child_steps": 5,
                "mutator_steps": 2,
                "mutator_steps_aggregate": 3,
                "mutator_lr": 0.01,
                "samples": 4,
            },
        ),
        "random": (RandomTrainer, {"samples": 4}),
    }
    trainer, further = makers[kind]
    return trainer(**{**arguments, **further, **overrides})


KINDS = ("darts", "unrolled", "enas", "random")


class Records(Dataset[dict[str, Tensor]]):
    """The same data as dicts; `names` are those of the inputs: the features in as many equal parts."""

    def __init__(self, names: tuple[str, ...], target: str, size: int = 48) -> None:
        self.inner = data(size)
        self.names = names
        self.target = target

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features, target = self.inner[index]
        parts = features.chunk(len(self.names))
        return {**dict(zip(self.names, parts, strict=True)), self.target: target}
