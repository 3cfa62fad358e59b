"""Resumed equals uninterrupted, bit for bit; and what happens when files are damaged or disks are full."""

from __future__ import annotations

import random
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nascompile import NascompileError
from nascompile.callbacks import Callback, LRSchedulerCallback
from nascompile.runtime.checkpoint import NAME, read_checkpoint, write_checkpoint
from nascompile.runtime.trainer import Trainer
from tests.runtime.toys import KINDS, Net, Planted, data, make, sgd


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augmentation with all three random number generators."""

    def __init__(self) -> None:
        self.inner = data(64)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.inner[index]
        return x + 0.1 * torch.randn(()) + 0.1 * np.random.randn() + 0.1 * random.random(), y


def trainer_of(kind: str, seed: int, **overrides: Any) -> Trainer:
    model = Net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    return make(
        kind,
        model,
        **{
            "optimizer": optimizer,
            "dataset_train": Noisy(),
            "num_epochs": 3,
            "callbacks": [LRSchedulerCallback(scheduler)],
            "seed": seed,
            **overrides,
        },
    )


def assert_equal_runs(one: Trainer, two: Trainer) -> None:
    assert one.history == two.history
    assert one.decisions == two.decisions
    for left, right in ((one.model, two.model), (one.mutator, two.mutator)):
        for name, value in left.state_dict().items():
            assert torch.equal(value, right.state_dict()[name]), name
    assert one.optimizer.param_groups[0]["lr"] == two.optimizer.param_groups[0]["lr"]
    assert one.mutator.export() == two.mutator.export()


# one kind is enough to show that loading processes do not matter
@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in KINDS), ("darts", 1)])
def test_resumed_equals_uninterrupted(kind: str, workers: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = trainer_of(kind, seed=1, workers=workers)
    whole.train()
    torch.manual_seed(1)

    class Stop(Callback):
        def on_epoch_end(self, epoch: int) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    interrupted = trainer_of(kind, seed=1, folder=tmp_path / "run", workers=workers)
    interrupted.callbacks.append(Stop())
    interrupted.callbacks[-1].build(interrupted.model, interrupted.mutator, interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert [file.name for file in (tmp_path / "run").iterdir()] == [NAME]

    # another seed, another initialisation: everything has to come from the file
    torch.manual_seed(2)
    resumed = trainer_of(kind, seed=2, workers=workers)
    resumed.resume(tmp_path / "run")
    assert resumed.epoch == 1
    resumed.train()
    assert_equal_runs(whole, resumed)


def test_resuming_a_finished_run_derives_the_same(tmp_path: Path) -> None:
    for kind in ("enas", "random"):
        first = trainer_of(kind, seed=1, folder=tmp_path / kind)
        first.train()
        again = trainer_of(kind, seed=2)
        again.resume(tmp_path / kind)
        again.train()
        assert_equal_runs(first, again)


def test_interrupted_in_the_first_epoch_is_resumable(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_batch_end(self, epoch: int) -> None:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    whole = make("darts", seed=1)
    whole.train()
    torch.manual_seed(1)
    stopped = make("darts", seed=1, folder=tmp_path, callbacks=[])
    stopped.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make("darts", seed=3)
    resumed.resume(tmp_path)
    resumed.train()
    assert_equal_runs(whole, resumed)


def test_nothing_is_written_before_training(tmp_path: Path) -> None:
    trainer = make("random", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    file = trainer.checkpoint()
    assert file == tmp_path / "run" / NAME
    with pytest.raises(NascompileError, match="needs a folder"):
        make("random").checkpoint()
    with pytest.raises(NascompileError, match="needs a folder"):
        make("random").resume()


def snapshot(trainer: Trainer) -> list[Tensor]:
    tensors = [
        *trainer.model.state_dict().values(),
        *trainer.mutator.state_dict().values(),
        torch.get_rng_state(),
    ]
    return [tensor.clone() for tensor in tensors]


def refused(trainer: Trainer, folder: Path, message: str) -> None:
    before = snapshot(trainer)
    with pytest.raises(NascompileError, match=message) as error:
        trainer.resume(folder)
    assert NAME in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(trainer), strict=True))


def test_damaged_checkpoints(tmp_path: Path) -> None:
    make("darts").checkpoint(tmp_path)
    file = tmp_path / NAME
    good = file.read_bytes()
    trainer = make("darts")
    with zipfile.ZipFile(file) as archive:
        member = next(i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 100)
    # the local header: 30 bytes, then the name and a padding, whose lengths are in bytes 26 to 29
    header = good[member.header_offset :]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    middle = member.header_offset + 30 + lengths + 50
    for name, content in {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"hello",
        "flipped": _flip(good, middle),
    }.items():
        file.write_bytes(content)
        refused(trainer, tmp_path, "is damaged")
        assert name
    file.write_bytes(good)
    trainer.resume(tmp_path)
    file.unlink()
    refused(trainer, tmp_path / NAME, "cannot be read: No such file")


def _flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_foreign_checkpoints(tmp_path: Path) -> None:
    trainer = make("darts")
    torch.save({"weights": torch.ones(3)}, tmp_path / NAME)
    refused(trainer, tmp_path, "is not a checkpoint written by nascompile")
    torch.save(Evil(tmp_path / "was run"), tmp_path / NAME)
    refused(trainer, tmp_path, "is damaged or no checkpoint")
    assert not (tmp_path / "was run").exists()
    make("random").checkpoint(tmp_path)
    refused(trainer, tmp_path, "written by a RandomTrainer, this is a DartsTrainer")
    make("darts", Planted()).checkpoint(tmp_path)
    refused(trainer, tmp_path, "does not fit: the model has 'first")
    make("darts", dataset_train=data(50)).checkpoint(tmp_path)
    refused(trainer, tmp_path, "made with 50 examples, there are 96")
    trainer_of("darts", seed=0, dataset_train=data()).checkpoint(tmp_path)
    refused(trainer, tmp_path, r"states of the callbacks \['LRSchedulerCallback'\], there are \[\]")
    model = Net()
    groups = [{"params": [p]} for p in model.parameters()]
    make("darts", model, optimizer=torch.optim.SGD(groups, lr=0.1)).checkpoint(tmp_path)
    refused(trainer, tmp_path, "the optimizer 'model' has groups of")
    make("darts").checkpoint(tmp_path)
    path, state = read_checkpoint(tmp_path)
    write_checkpoint(tmp_path, {**state, "version": 99})
    refused(trainer, tmp_path, "has version 99")
    del state["random"]
    write_checkpoint(tmp_path, state)
    refused(trainer, tmp_path, "is incomplete: it lacks random")
    assert path == tmp_path / NAME
    wide = Net()
    wide.head = nn.Linear(8, 5)
    make("darts", wide).checkpoint(tmp_path)
    refused(trainer, tmp_path, r"'head.weight' has shape \(3, 8\), in the checkpoint \(5, 8\)")


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    trainer = make("darts")
    file = trainer.checkpoint(tmp_path)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(NascompileError, match=r"checkpoint\.pt' cannot be written: File too large"):
            trainer.checkpoint(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [NAME]
    make("darts").resume(tmp_path)


def test_unwritable_places(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    trainer = make("darts")
    with pytest.raises(NascompileError, match=r"checkpoint .*file.* cannot be written"):
        trainer.checkpoint(blocked)
    with pytest.raises(NascompileError, match=r"architecture .*below\.json' cannot be written: "):
        trainer.export(blocked / "below.json")


def test_state_that_could_not_be_read_back_is_refused_when_written(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, {"a": 1})
    before = file.read_bytes()
    with pytest.raises(NascompileError, match="cannot be written"):
        write_checkpoint(tmp_path, {"a": random.Random()})
    with pytest.raises(NascompileError, match="cannot be written"):
        write_checkpoint(tmp_path, {"a": lambda: None})
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [NAME]
