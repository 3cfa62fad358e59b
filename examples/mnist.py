"""ENAS from start to end on handwritten digits: search, export, fix the architecture, train it from scratch.

python examples/mnist.py --data DIR     DIR holds MNIST's IDX files, plain or as .gz
python examples/mnist.py                scikit-learn's 1797 digits of 8x8, enlarged to 28x28
python examples/mnist.py --epochs 1 --limit 400      a quick look
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from nascompile.enas import EnasTrainer
from nascompile.fixed import apply_fixed_architecture
from nascompile.mutables import InputChoice, LayerChoice
from nascompile.runtime.datasets import read_mnist

BATCH_SIZE = 64


class Net(nn.Module):
    """A small convolutional network with two choices of a kernel size and an optional skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = LayerChoice([nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(1, 32, 5, padding=2)])
        self.mid_conv = LayerChoice([nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 5, padding=2)])
        # one candidate, any number chosen: the skip connection is there or not
        self.skipcon = InputChoice(n_candidates=1)
        self.bn = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x0 = self.pool(F.relu(self.conv1(x)))
        x = F.relu(self.bn(self.mid_conv(x0)))
        x0 = self.skipcon([x0])
        if x0 is not None:
            x = x + x0
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of samples whose largest logit is at the target; also the reward of the controller."""
    return (logits.argmax(dim=1) == target).float().mean().item()


def load(folder: Path | None, limit: int | None) -> tuple[Dataset, Dataset]:
    """Training and test set, shortened to `limit` and limit / 5 images; says what it reads."""
    if folder is None:
        images = _digits()
        print(f"data: scikit-learn's digits, {len(images)} images; --data DIR reads MNIST")
    elif any(folder.glob("train-images-idx3-ubyte*")):
        print(f"data: MNIST from {folder}")
        n_test = None if limit is None else max(1, limit // 5)
        return read_mnist(folder, limit=limit), read_mnist(folder, train=False, limit=n_test)
    else:
        images = read_mnist(folder, train=False)
        print(
            f"data: {folder} has no training files of MNIST; its test images serve for both training and test"
        )
    # the last sixth is for the test
    count = len(images) if limit is None else min(len(images), limit + max(1, limit // 5))
    n_test = max(1, count // 6)
    return Subset(images, range(count - n_test)), Subset(images, range(count - n_test, count))


def _digits() -> TensorDataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    # 8x8 to 24x24, and a border of 2
    images = F.pad(F.interpolate(images, scale_factor=3.0), (2, 2, 2, 2))
    return TensorDataset(images, torch.from_numpy(labels).long())


def search(train: Dataset, valid: Dataset, epochs: int, architecture: Path) -> None:
    """Search with ENAS and write the best architecture to a file."""
    model = Net()
    steps = max(1, len(train) // BATCH_SIZE)  # type: ignore[arg-type]
    trainer = EnasTrainer(
        model,
        loss=nn.CrossEntropyLoss(),
        metrics=lambda logits, target: {"accuracy": accuracy(logits, target)},
        reward_function=accuracy,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
        num_epochs=epochs,
        dataset_train=train,
        dataset_valid=valid,
        batch_size=BATCH_SIZE,
        workers=0,
        child_steps=steps,
        mutator_steps=max(1, steps // 10),
        mutator_steps_aggregate=5,
    )
    print(f"searching: {epochs} epochs of {steps} steps for the weights", flush=True)
    trainer.train()
    trainer.export(file=str(architecture))


def retrain(train: Dataset, test: Dataset, epochs: int, architecture: Path) -> float:
    """Train the architecture of the file from scratch; its accuracy on the test set."""
    model = Net()
    apply_fixed_architecture(model, str(architecture))
    print(f"retraining {sum(p.numel() for p in model.parameters())} parameters")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        loader = DataLoader(train, BATCH_SIZE, shuffle=True)
        for images, target in loader:
            loss = F.cross_entropy(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: training loss {total / len(loader):.4f}")
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(dim=1) == y).sum().item() for x, y in DataLoader(test, 256))
    return right / len(test)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description="ENAS on handwritten digits, from search to retraining.")
    parser.add_argument(
        "--data", type=Path, help="folder of MNIST's IDX files; scikit-learn's digits without it"
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="epochs of the search and of the retraining (default 5)"
    )
    parser.add_argument("--limit", type=int, help="use the first so many training images (default all)")
    parser.add_argument(
        "--architecture", type=Path, default=Path("mnist_architecture.json"), help="file to write"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = load(options.data, options.limit)
    # the search must not see the test set: a tenth of the training set judges the architectures
    n_valid = max(1, len(train) // 10)  # type: ignore[arg-type]
    fitted = Subset(train, range(n_valid, len(train)))  # type: ignore[arg-type]
    search(fitted, Subset(train, range(n_valid)), options.epochs, options.architecture)
    print(f"architecture in {options.architecture}: {options.architecture.read_text().strip()}")
    print(f"test accuracy {retrain(train, test, options.epochs, options.architecture):.4f}")


if __name__ == "__main__":
    main()
