"""All that a run is at the end of an epoch: collected for a checkpoint, checked, put back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.checkpoint import read_checkpoint, why_not_tensors, write_checkpoint
from nascompile.runtime.randomness import random_state, restore_random_state
from nascompile.runtime.replaying import settle_optimizers

if TYPE_CHECKING:
    from nascompile.runtime.callbacks import Callback
    from nascompile.runtime.trainer import Trainer


_PARTS = (
    "trainer",
    "epoch",
    "history",
    "decisions",
    "model",
    "mutator",
    "loss",
    "optimizers",
    "scaler",
    "callbacks",
    "loaders",
    "random",
    "extra",
)


def save_state(trainer: Trainer, folder: str | Path) -> Path:
    """Write the trainer's state into `folder`; the file written. Raises NascompileError when that fails."""
    state = {
        "trainer": type(trainer).__name__,
        "epoch": trainer.epoch,
        "history": trainer.history,
        "decisions": trainer.decisions,
        "model": trainer.model.state_dict(),
        "mutator": trainer.mutator.state_dict(),
        "loss": _loss_state(trainer),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in trainer.optimizers().items()},
        "scaler": trainer.acceleration.state_dict(),
        "callbacks": [
            {"class": type(callback).__name__, "state": callback.state_dict()}
            for callback in _with_state(trainer)
        ],
        "loaders": {name: loader.state_dict() for name, loader in trainer.loaders().items()},
        "random": random_state(),
        "extra": trainer.extra_state(),
    }
    assert tuple(state) == _PARTS
    return write_checkpoint(folder, state)


def load_state(trainer: Trainer, folder: str | Path) -> None:
    """Put back what `save_state` wrote; raises NascompileError, changing nothing, when it does not fit."""
    path, state = read_checkpoint(folder)
    missing = [part for part in _PARTS if part not in state]
    if missing:
        raise NascompileError(f"checkpoint {str(path)!r} is incomplete: it lacks {', '.join(missing)}")
    reason = _why_not(trainer, state)
    if reason is not None:
        raise NascompileError(f"checkpoint {str(path)!r} does not fit: {reason}")
    trainer.model.load_state_dict(state["model"])
    trainer.mutator.load_state_dict(state["mutator"])
    if isinstance(trainer.loss, nn.Module):
        trainer.loss.load_state_dict(state["loss"])
    for name, optimizer in trainer.optimizers().items():
        optimizer.load_state_dict(state["optimizers"][name])
    settle_optimizers(trainer)
    trainer.acceleration.load_state_dict(state["scaler"])
    for callback, saved in zip(_with_state(trainer), state["callbacks"], strict=True):
        callback.load_state_dict(saved["state"])
    for name, loader in trainer.loaders().items():
        loader.load_state_dict(state["loaders"][name])
    trainer.load_extra_state(state["extra"])
    trainer.epoch = state["epoch"]
    trainer.history = state["history"]
    trainer.decisions = state["decisions"]
    # last: nothing above may draw after this
    restore_random_state(state["random"])


def _why_not(trainer: Trainer, state: dict[str, Any]) -> str | None:
    if state["trainer"] != type(trainer).__name__:
        return f"it was written by a {state['trainer']}, this is a {type(trainer).__name__}"
    reason = (
        why_not_tensors(state["model"], trainer.model.state_dict(), "the model")
        or why_not_tensors(state["mutator"], trainer.mutator.state_dict(), "the mutator")
        or why_not_tensors(state["loss"], _loss_state(trainer), "the loss")
        or _why_not_optimizers(trainer, state["optimizers"])
    )
    if reason is not None:
        return reason
    saved = [callback["class"] for callback in state["callbacks"]]
    current = [type(callback).__name__ for callback in _with_state(trainer)]
    if saved != current:
        return f"it has the states of the callbacks {saved}, there are {current}"
    for name, loader in trainer.loaders().items():
        reason = loader.why_not(state["loaders"][name])
        if reason is not None:
            return reason
    return None


def _why_not_optimizers(trainer: Trainer, saved: dict[str, Any]) -> str | None:
    for name, optimizer in trainer.optimizers().items():
        current = [len(group["params"]) for group in optimizer.param_groups]
        stored = [len(group["params"]) for group in saved[name]["param_groups"]]
        if current != stored:
            return f"the optimizer {name!r} has groups of {current} parameters, in the checkpoint {stored}"
    return None


def _with_state(trainer: Trainer) -> list[Callback]:
    # the others, such as a progress bar, may come and go
    return [callback for callback in trainer.callbacks if callback.state_dict()]


def _loss_state(trainer: Trainer) -> dict[str, Any]:
    return trainer.loss.state_dict() if isinstance(trainer.loss, nn.Module) else {}
