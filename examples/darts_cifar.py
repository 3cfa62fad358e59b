"""The DARTS search on CIFAR-10 (Liu et al. 2018, section 3.1): `nascompile examples/darts_cifar.py`.

Environment variables:
    NASCOMPILE_CIFAR10   folder of CIFAR-10's binary version (data_batch_1.bin, ...); without it images are
                         made up, a pattern for each class under noise, and the file says so
    NASCOMPILE_CELLS     8 in the paper's search, and here
    NASCOMPILE_CHANNELS  16 in the paper's search, and here
    NASCOMPILE_IMAGES    how many images to use, validation included: by default 50000, or 2000 made-up ones
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from nascompile import NascompileError
from nascompile.runtime.datasets import read_cifar10
from nascompile.spaces import DartsNetwork

SYNTHETIC_IMAGES = 2000


def model() -> nn.Module:
    """The supernet: 8 cells of 4 nodes, 16 channels, seven candidates an edge."""
    return DartsNetwork(
        in_size=32,
        in_channels=3,
        channels=_number("NASCOMPILE_CHANNELS", 16),
        n_classes=10,
        n_layers=_number("NASCOMPILE_CELLS", 8),
        n_nodes=4,
    )


def example_inputs() -> Tensor:
    """One batch of the shape that the model sees."""
    return torch.zeros(2, 3, 32, 32)


def dataset_train() -> Dataset:
    """Nine tenths of the images; the DARTS trainer itself halves them, for weights and for architecture."""
    images = _images()
    return Subset(images, range(len(images) - len(images) // 10))


def dataset_valid() -> Dataset:
    """The last tenth."""
    images = _images()
    return Subset(images, range(len(images) - len(images) // 10, len(images)))


loss = nn.CrossEntropyLoss()


def metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Top-1 accuracy, 0 to 1."""
    return {"accuracy": (logits.argmax(dim=1) == target).float().mean().item()}


def optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """The paper's, for the weights."""
    return torch.optim.SGD(network.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)


@functools.cache
def _images() -> TensorDataset:
    folder = os.environ.get("NASCOMPILE_CIFAR10")
    if folder:
        limit = _number("NASCOMPILE_IMAGES", 50_000)
        data = read_cifar10(folder, limit=limit)
        print(f"data: {len(data)} images of CIFAR-10 from {folder}", flush=True)
        return data
    count = _number("NASCOMPILE_IMAGES", SYNTHETIC_IMAGES)
    print(
        f"data: {count} made-up images (set NASCOMPILE_CIFAR10 to the folder of CIFAR-10's binary version)",
        flush=True,
    )
    return _made_up(count)


def _made_up(count: int) -> TensorDataset:
    """Ten fixed patterns, one a class, under noise of twice their size: learnable, and nothing more."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 32, 32, generator=generator)
    labels = torch.arange(count) % 10
    return TensorDataset(patterns[labels] + 2 * torch.randn(count, 3, 32, 32, generator=generator), labels)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdigit() or int(text) < 1:
        raise NascompileError(
            f"environment variable {variable} is {text!r}, expected a whole number of at least 1"
        )
    return int(text)
