"""What a trainer calls as it goes along, with the names of NNI 1.x."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.mutator import BaseMutator
from nascompile.runtime.checkpoint import replace_whole

if TYPE_CHECKING:
    from nascompile.runtime.trainer import Trainer


class Callback:
    """Override what is needed. A batch is one step of the weights; `trainer.step` counts them.

    `trainer.epoch_metrics` holds the averages of the epoch when `on_epoch_end` is called. What has to survive
    a resumption goes through `state_dict` and `load_state_dict`.
    """

    model: nn.Module
    mutator: BaseMutator
    trainer: Trainer

    def build(self, model: nn.Module, mutator: BaseMutator, trainer: Trainer) -> None:
        """Called once, when the trainer is made (what only its subclass adds is not there yet)."""
        self.model = model
        self.mutator = mutator
        self.trainer = trainer

    def on_epoch_begin(self, epoch: int) -> None:
        """Before the first batch of an epoch (counted from 0)."""

    def on_epoch_end(self, epoch: int) -> None:
        """After the validation of an epoch."""

    def on_batch_begin(self, epoch: int) -> None:
        """Before a step of the weights."""

    def on_batch_end(self, epoch: int) -> None:
        """After a step of the weights."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class LRSchedulerCallback(Callback):
    """Steps a learning rate scheduler after every epoch (`mode="epoch"`) or batch (`mode="batch"`)."""

    def __init__(self, scheduler: Any, mode: str = "epoch") -> None:
        if mode not in ("epoch", "batch"):
            raise NascompileError(f'mode is {mode!r}, expected "epoch" or "batch"')
        self.scheduler = scheduler
        self.mode = mode

    def on_epoch_end(self, epoch: int) -> None:
        """Step, in mode "epoch"."""
        if self.mode == "epoch":
            self.scheduler.step()

    def on_batch_end(self, epoch: int) -> None:
        """Step, in mode "batch"."""
        if self.mode == "batch":
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scheduler."""
        self.scheduler.load_state_dict(state)


class ArchitectureCheckpoint(Callback):
    """Exports the current architecture to `checkpoint_dir/epoch_<n>.json`, after every epoch."""

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)

    def on_epoch_end(self, epoch: int) -> None:
        """Export."""
        self.trainer.export(self.checkpoint_dir / f"epoch_{epoch}.json")


class ModelCheckpoint(Callback):
    """Writes the model's `state_dict` to `checkpoint_dir/epoch_<n>.pth.tar`, after every epoch.

    These files hold the weights only; `trainer.checkpoint` writes what a resumption needs.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)

    def on_epoch_end(self, epoch: int) -> None:
        """Save."""
        state = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        path = self.checkpoint_dir / f"epoch_{epoch}.pth.tar"
        replace_whole(path, lambda stream: torch.save(state, stream), "model checkpoint")
