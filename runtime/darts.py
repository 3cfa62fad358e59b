"""DARTS: architecture and weights by gradient descent in turns (Liu 2018, arXiv 1806.09055)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.mutator import SoftDecision
from nascompile.runtime.batches import Batch
from nascompile.runtime.bilevel import unrolled_gradient
from nascompile.runtime.callbacks import Callback
from nascompile.runtime.darts_mutator import DartsMutator
from nascompile.runtime.loading import EpochLoader, split_indices
from nascompile.runtime.meters import AverageMeterGroup
from nascompile.runtime.randomness import new_generator
from nascompile.runtime.replaying import replayed
from nascompile.runtime.trainer import Loss, Metrics, RunOptions, Trainer


class DartsTrainer(Trainer):
    """DARTS with the signature of NNI 1.x; further keyword arguments are those of `Trainer`.

    `dataset_train` is split at random into two halves, one for the weights and one for the architecture. Each
    step first moves the architecture parameters (Adam, `arc_learning_rate`, betas 0.5 and 0.999, weight decay
    1e-3) down the loss on a batch of the second half, then the weights down the loss on a batch of the first.
    With `unrolled`, the architecture follows the validation loss after the next step of the weights (second
    order; see `nascompile.runtime.bilevel.unrolled_gradient`, also for what an optimizer other than SGD
    means); it leaves weights and BatchNorm's running statistics untouched, costs about four times the first
    order, and does not go with precision "fp16". In the first order, the architecture step's forward pass
    counts in the running statistics, as in the reference.
    """

    default_mutator = DartsMutator
    mutator: DartsMutator

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        metrics: Metrics | None,
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        dataset_train: Dataset[Any],
        dataset_valid: Dataset[Any],
        mutator: DartsMutator | None = None,
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        callbacks: Sequence[Callback] | None = None,
        arc_learning_rate: float = 3.0e-4,
        unrolled: bool = False,
        *,
        aux_weight: float = 0.4,
        **options: Unpack[RunOptions],
    ) -> None:
        if unrolled and options.get("precision") == "fp16":
            raise NascompileError('unrolled=True does not go with precision "fp16"; use "bf16" or "no"')
        super().__init__(
            model, mutator, loss, metrics, optimizer, num_epochs, dataset_train, dataset_valid,
            batch_size, workers, device, log_frequency, callbacks, aux_weight=aux_weight, **options,
        )  # fmt: skip
        self.unrolled = unrolled
        self.mutator.to(self.device)
        self.alphas: list[nn.Parameter] = [p for p in self.mutator.parameters() if p.requires_grad]
        if not self.alphas:
            if mutator is None:
                self.mutator.release()
            raise NascompileError("DARTS has nothing to search: the model has no LayerChoice")
        self.ctrl_optim = torch.optim.Adam(
            self.alphas, arc_learning_rate, betas=(0.5, 0.999), weight_decay=1e-3
        )
        self._prepared_ctrl = self.acceleration.prepare(self.ctrl_optim)
        for_weights, for_alphas = split_indices(dataset_train, 0.5, new_generator())
        self.train_loader = self.make_loader(dataset_train, indices=for_weights)
        self.valid_loader = self.make_loader(dataset_train, indices=for_alphas)
        reason = "the second order reads a norm, and sets random states, on the host" if unrolled else None
        self._search_step = replayed(self, self.search_step, reason)

    @property
    def steps_per_epoch(self) -> int:
        """The batches of the smaller half."""
        return min(len(self.train_loader), len(self.valid_loader))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers of the weights and of the architecture."""
        return {"model": self.optimizer, "architecture": self.ctrl_optim}

    def loaders(self) -> dict[str, EpochLoader]:
        """The two halves."""
        return {"train": self.train_loader, "valid": self.valid_loader}

    def train_one_epoch(self, epoch: int) -> dict[str, float]:
        """Alternate steps of the architecture and of the weights."""
        self.set_training(True)
        self.mutator.train()
        meters = AverageMeterGroup()
        for raw_train, raw_valid in zip(self.train_loader, self.valid_loader, strict=False):
            train, valid = self.split(raw_train), self.split(raw_valid)
            if self.replays:
                self._replayed_step(train, valid, meters, epoch)
                continue
            self.architecture_step(train, valid)
            self.decide()
            self.weight_step(train, meters, epoch)
        return meters.averages()

    def _replayed_step(self, train: Batch, valid: Batch, meters: AverageMeterGroup, epoch: int) -> None:
        for callback in self.callbacks:
            callback.on_batch_begin(epoch)
        logits, loss, masks = self._search_step(train, valid)
        # a replay decides without Python
        is_soft = isinstance(self.mutator.decision, SoftDecision)
        self.mutator.decide(SoftDecision(masks) if is_soft else masks)
        self._decided.add(self.mutator.decision)
        self.after_step(train, logits, loss, meters, epoch)

    def search_step(self, train: Batch, valid: Batch) -> tuple[Any, Tensor, dict[str, Any]]:
        """A step of the architecture and one of the weights; the logits, loss and decision of the latter."""
        self.architecture_step(train, valid)
        self.mutator.reset()
        logits, loss = self.update_weights(train)
        return logits, loss, dict(self.mutator.decision)

    def architecture_step(self, train: Batch, valid: Batch) -> None:
        """One step of the architecture parameters."""
        for alpha in self.alphas:
            alpha.grad = None
        if self.unrolled:
            gradients = unrolled_gradient(
                lambda: self._loss(train), lambda: self._loss(valid), self.optimizer, self.alphas,
                buffers=list(self.model.buffers()),
            )  # fmt: skip
            for alpha, gradient in zip(self.alphas, gradients, strict=True):
                alpha.grad = gradient
        else:
            self.acceleration.backward(self._loss(valid), self.alphas)
        self._prepared_ctrl.step()

    def _loss(self, batch: Batch) -> Tensor:
        self.mutator.reset()
        return self.forward(batch)[1]
