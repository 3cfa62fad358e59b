"""Callbacks are called in order, and the built-in ones do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nascompile import NascompileError
from nascompile.callbacks import ArchitectureCheckpoint, Callback, LRSchedulerCallback, ModelCheckpoint
from nascompile.runtime.trainer import Trainer
from nascompile.utils import AverageMeter, AverageMeterGroup, global_mutable_counting, to_device, to_list
from tests.runtime.toys import KINDS, Net, make, sgd


class Log(Callback):
    """Writes down every call, and what is known then."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def build(self, model: object, mutator: object, trainer: Trainer) -> None:
        super().build(model, mutator, trainer)  # pyright: ignore
        self.calls.append("build")

    def on_epoch_begin(self, epoch: int) -> None:
        self.calls.append(f"epoch {epoch} history {len(self.trainer.history)}")

    def on_epoch_end(self, epoch: int) -> None:
        assert self.trainer.epoch_metrics["valid_loss"] > 0
        self.calls.append(f"end {epoch} history {len(self.trainer.history)}")

    def on_batch_begin(self, epoch: int) -> None:
        self.calls.append(f"batch {epoch}.{self.trainer.step}")

    def on_batch_end(self, epoch: int) -> None:
        self.calls.append(f"done {epoch}.{self.trainer.step}")


@pytest.mark.parametrize("kind", KINDS)
def test_order(kind: str) -> None:
    log = Log()
    trainer = make(kind, callbacks=[log])
    assert log.calls == ["build"]
    assert log.trainer is trainer
    assert log.model is trainer.model
    assert log.mutator is trainer.mutator
    trainer.train()
    steps = trainer.steps_per_epoch
    wanted = ["build"]
    for epoch in range(2):
        wanted.append(f"epoch {epoch} history {epoch}")
        for step in range(steps):
            wanted += [f"batch {epoch}.{step}", f"done {epoch}.{step + 1}"]
        wanted.append(f"end {epoch} history {epoch + 1}")
    assert log.calls == wanted


@pytest.mark.parametrize(("mode", "steps"), [("epoch", 2), ("batch", 12)])
def test_scheduler(mode: str, steps: int) -> None:
    model = Net()
    optimizer = sgd(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    make("random", model, optimizer=optimizer, callbacks=[LRSchedulerCallback(scheduler, mode)]).train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**steps)
    with pytest.raises(NascompileError, match="mode is 'step'"):
        LRSchedulerCallback(scheduler, "step")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_epoch(kind: str, tmp_path: Path) -> None:
    callbacks = [ArchitectureCheckpoint(tmp_path / "arch"), ModelCheckpoint(tmp_path / "model")]
    trainer = make(kind, callbacks=callbacks)
    trainer.train()
    trainer.export(tmp_path / "final.json")
    assert sorted(f.name for f in (tmp_path / "arch").iterdir()) == ["epoch_0.json", "epoch_1.json"]
    final = json.loads((tmp_path / "final.json").read_text())
    assert json.loads((tmp_path / "arch" / "epoch_1.json").read_text()) == final
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["epoch_0.pth.tar", "epoch_1.pth.tar"]
    state = torch.load(tmp_path / "model" / "epoch_1.pth.tar", weights_only=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, state[name])


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Deriving an architecture after every epoch leaves the run as it would have been."""
    histories = []
    for callbacks in ([], [ArchitectureCheckpoint(tmp_path)]):
        torch.manual_seed(0)
        trainer = make("enas", seed=0, callbacks=callbacks)
        trainer.train()
        histories.append(trainer.history)
    assert histories[0] == histories[1]


def test_meters() -> None:
    group = AverageMeterGroup()
    group.update({"loss": torch.tensor(2.0), "acc": 1}, n=3)
    group.update({"loss": torch.tensor(6.0, requires_grad=True)})
    assert group.averages() == {"loss": 3.0, "acc": 1.0}
    assert group.loss.val == 6.0
    assert group["loss"].count == 4
    assert str(group) == "loss 6.0000 (3.0000)  acc 1.0000 (1.0000)"
    assert group.summary() == "loss: 3.0000  acc: 1.0000"
    with pytest.raises(AttributeError, match="there are: loss, acc"):
        _ = group.other
    meter = AverageMeter("x", ":.1f")
    assert meter.avg == 0
    meter.update(2)
    assert str(meter) == "x 2.0 (2.0)"
    meter.reset()
    assert (meter.sum, meter.count) == (0, 0)


def test_utils() -> None:
    moved = to_device([torch.ones(2), ({"a": torch.zeros(1)}, None, 3, "s")], "meta")
    assert moved[0].device.type == "meta"
    assert moved[1][0]["a"].device.type == "meta"
    assert moved[1][1:] == (None, 3, "s")
    assert to_device(None, "cpu") is None
    assert to_list(torch.tensor([1, 2])) == [1, 2]
    assert to_list((1, 2)) == [1, 2]
    first = global_mutable_counting()
    assert global_mutable_counting() == first + 1
