"""The whole product in seconds: search a small space, prune, retrain, export, load elsewhere, agree."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nascompile
from nascompile.darts import DartsTrainer
from nascompile.fixed import apply_fixed_architecture
from nascompile.mutables import InputChoice, LayerChoice
from nascompile.random import RandomTrainer
from tests.comparing import Decided, assert_close

WIDTH = 8


class Part(nn.Module):
    """Three candidates, two of which carry information, and an optional skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice(
            OrderedDict(
                zero=Zero(),
                linear=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
                copy=nn.Identity(),
            ),
            key="op",
        )
        self.skip = InputChoice(n_candidates=1, key="skip")

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.op(x))
        x0 = self.skip([x])
        if x0 is not None:
            y += x0
        return y


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.parts = nn.Sequential(Part(), Part())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts(self.stem(x)))


def data(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x.prod(1) > 0).long())


def accuracy(logits: Tensor, target: Tensor) -> dict[str, float]:
    return {"accuracy": float((logits.argmax(1) == target).float().mean())}


def search(kind: Any, model: nn.Module, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = kind(
        model, nn.CrossEntropyLoss(), accuracy, optimizer, 2, data(256, 0), data(128, 1),
        batch_size=32, workers=0, device="cpu", seed=0, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "options"), [(DartsTrainer, {"arc_learning_rate": 0.1}), (RandomTrainer, {"samples": 4})]
)
def test_the_whole_line(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    trainer = search(kind, model, **options)
    assert isinstance(trainer.compiled, nascompile.CompiledModel)
    assert not trainer.compiled.islands
    assert [row["epoch"] for row in trainer.history] == [0, 1]

    path = tmp_path / "architecture.json"
    trainer.export(file=str(path))
    architecture = json.loads(path.read_text())
    assert set(architecture) == {"op", "skip"}

    lean = nascompile.prune(model, path, torch.randn(2, 4))
    fixed = Net()
    fixed.load_state_dict(model.state_dict())
    apply_fixed_architecture(fixed, path)
    x = torch.randn(5, 4)
    assert torch.equal(lean.eval()(x), fixed.eval()(x))
    parts = 2 * (WIDTH * WIDTH + 3 * WIDTH) if architecture["op"] == "linear" else 0
    assert sum(p.numel() for p in lean.parameters()) == 5 * WIDTH + parts + 2 * WIDTH + 2
    count = nascompile.count(model, x, path)
    assert count.parameters == sum(p.numel() for p in lean.parameters())

    optimizer = torch.optim.Adam(lean.train().parameters(), 0.01)
    train = data(256, 0)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(lean(train.tensors[0]), train.tensors[1])
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in lean.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    exported = nascompile.export(lean.eval(), tmp_path / "lean.pt", (x,), format="torchscript")
    torch.save({"x": x, "y": lean(x)}, tmp_path / "expected.pth")
    assert_loads_alone(exported, tmp_path / "expected.pth")


def assert_loads_alone(exported: Path, expected: Path) -> None:
    """The file works in a process that cannot import nascompile."""
    program = (
        "import sys, torch\n"
        "sys.modules['nascompile'] = None\n"
        "expected = torch.load(sys.argv[2], weights_only=True)\n"
        "out = torch.jit.load(sys.argv[1])(expected['x'])\n"
        "torch.testing.assert_close(out, expected['y'], rtol=0, atol=0)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(exported), str(expected)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=expected.parent, check=False)
    assert process.returncode == 0, process.stderr


def test_compiled_is_eager() -> None:
    torch.manual_seed(0)
    eager = Net()
    model = copy.deepcopy(eager)
    compiled = nascompile.compile(model, torch.randn(2, 4), require="traced")
    x = torch.randn(6, 4)
    for op, skip in (
        ([0.2, 0.5, 0.3], [1.0]),
        ([False, True, False], [False]),
        ([False, False, True], [True]),
    ):
        for network in (eager, compiled):
            mutator: Any = next(
                (m.bound_mutator for m in network.modules() if isinstance(m, LayerChoice)), None
            )
            (mutator or Decided(network)).decide({"op": torch.tensor(op), "skip": torch.tensor(skip)})
        assert_close(compiled(x), eager.forward(x), rtol=1e-5, atol=1e-6)
    assert_close(dict(compiled.state_dict()), dict(eager.state_dict()), rtol=1e-5, atol=1e-6)
