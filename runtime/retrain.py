"""Training a lean network: supervised epochs, the learning rate falling to zero, resumable after each."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.acceleration import Acceleration
from nascompile.runtime.batches import split_batch, to_device
from nascompile.runtime.checkpoint import NAME, read_checkpoint, write_checkpoint
from nascompile.runtime.ingredients import Ingredients, split_output
from nascompile.runtime.job_settings import Settings
from nascompile.runtime.loading import EpochLoader
from nascompile.runtime.meters import AverageMeterGroup
from nascompile.runtime.randomness import seed_everything
from nascompile.runtime.report import evaluate

logger = logging.getLogger(__name__)

_GRADIENT_NORM = 5.0


@dataclass
class Progress:
    """Calls while training: a step is one batch, a record the averages of one epoch."""

    step: Callable[[], None]
    epoch: Callable[[Mapping[str, Any]], None]


class Retraining:
    """Trains `lean` on the whole training set for `settings.retrain` epochs, a checkpoint in `folder` after
    each.

    Every epoch seeds the generators by itself, so that a resumed training equals an uninterrupted one.
    Training starts anew when the checkpoint belongs to another architecture or another number of epochs.
    Raises NascompileError for a damaged checkpoint.
    """

    def __init__(
        self,
        lean: nn.Module,
        architecture: Mapping[str, Any],
        ingredients: Ingredients,
        settings: Settings,
        folder: Path,
    ) -> None:
        self.acceleration = Acceleration(
            None if settings.device == "auto" else settings.device, settings.precision
        )
        self.lean = lean.to(self.acceleration.device)
        self.history: list[dict[str, Any]] = []
        self._ingredients = ingredients
        self._settings = settings
        self._folder = folder
        self._optimizer = self.acceleration.prepare(ingredients.new_optimizer(lean))
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._identity = {
            "architecture": dict(architecture),
            "epochs": settings.retrain,
            "inherit": settings.inherit,
        }

    def resume(self) -> None:
        """Continue from the checkpoint in the folder, if there is one of the same training."""
        if not (self._folder / NAME).is_file():
            return
        path, state = read_checkpoint(self._folder)
        if state.get("identity") != self._identity:
            return
        try:
            self.lean.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.acceleration.load_state_dict(state["acceleration"])
            self.history = state["history"]
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise NascompileError(
                f"checkpoint {str(path)!r} does not fit the lean network: {reason}"
            ) from error

    def run(self, progress: Progress) -> None:
        """Train the epochs that are left."""
        for epoch in range(len(self.history), self._settings.retrain):
            # both the order of the data and dropout depend on the epoch alone
            seed = self._settings.seed + 1_000_003 * (epoch + 1)
            seed_everything(seed)
            self._set_rate(epoch)
            record = {"epoch": epoch, **self._train_epoch(seed, progress.step), **self._validate()}
            self.history.append(record)
            self._checkpoint()
            figures = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "epoch")
            logger.info("retraining %d/%d  %s", epoch + 1, self._settings.retrain, figures)
            progress.epoch(record)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._loader(torch.Generator()))

    def _set_rate(self, epoch: int) -> None:
        fraction = 0.5 * (1 + math.cos(math.pi * epoch / self._settings.retrain))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * fraction

    def _loader(self, generator: torch.Generator) -> EpochLoader:
        return EpochLoader(
            self._ingredients.dataset_train,
            batch_size=self._settings.batch_size,
            workers=self._settings.workers,
            generator=generator,
            pin_memory=self.acceleration.device.type == "cuda",
        )

    def _train_epoch(self, seed: int, step: Callable[[], None]) -> dict[str, float]:
        self.lean.train()
        meters = AverageMeterGroup()
        parameters = [p for p in self.lean.parameters() if p.requires_grad]
        for raw in self._loader(torch.Generator().manual_seed(seed)):
            batch = split_batch(to_device(raw, self.acceleration.device), self.lean)
            self._optimizer.zero_grad()
            with self.acceleration.autocast():
                output = self.lean(*batch.args, **batch.kwargs)
                loss = self._ingredients.training_loss(output, batch.target)
            self.acceleration.backward(loss, parameters)
            self.acceleration.clip(self._optimizer, parameters, _GRADIENT_NORM)
            self._optimizer.step()
            figures = {"loss": loss, **self._ingredients.measure(split_output(output)[0], batch.target)}
            meters.update({f"train_{name}": value for name, value in figures.items()}, batch.size)
            step()
        return meters.averages()

    def _validate(self) -> dict[str, float]:
        figures = evaluate(
            self.lean,
            self._ingredients.dataset_valid,
            ingredients=self._ingredients,
            acceleration=self.acceleration,
            batch_size=self._settings.batch_size,
            workers=self._settings.workers,
        )
        return {f"valid_{name}": value for name, value in figures.items()}

    def _checkpoint(self) -> None:
        state = {
            "identity": self._identity,
            "model": self.lean.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "acceleration": self.acceleration.state_dict(),
            "history": self.history,
        }
        write_checkpoint(self._folder, state)
