"""Random search over a supernet with shared weights: the baseline that every other method has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.data import Dataset

from nascompile.runtime.callbacks import Callback
from nascompile.runtime.loading import EpochLoader
from nascompile.runtime.meters import AverageMeterGroup
from nascompile.runtime.random_mutator import RandomMutator
from nascompile.runtime.sampling_trainer import SamplingTrainer
from nascompile.runtime.trainer import Loss, Metrics, RunOptions


class RandomTrainer(SamplingTrainer):
    """Trains the supernet with a uniformly sampled path a batch, then keeps the best of several paths.

    `dataset_train` trains, `dataset_valid` ranks: by the mean of `reward_function(logits, target)`, or
    without one by the loss. `samples` is how many architectures are tried. The other arguments are those of
    NNI's trainers and of `Trainer`. (Li and Talwalkar 2019, arXiv 1902.07638.)
    """

    default_mutator = RandomMutator
    mutator: RandomMutator

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        metrics: Metrics | None,
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        dataset_train: Dataset[Any],
        dataset_valid: Dataset[Any],
        mutator: RandomMutator | None = None,
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        callbacks: Sequence[Callback] | None = None,
        *,
        reward_function: Callable[[Any, Any], Any] | None = None,
        samples: int = 20,
        aux_weight: float = 0.4,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(
            model, mutator, loss, metrics, optimizer, num_epochs, dataset_train, dataset_valid,
            batch_size, workers, device, log_frequency, callbacks,
            reward_function=reward_function, samples=samples, aux_weight=aux_weight, **options,
        )  # fmt: skip
        self.train_loader = self.make_loader(dataset_train)

    @property
    def steps_per_epoch(self) -> int:
        """The batches of `dataset_train`."""
        return len(self.train_loader)

    @property
    def ranking_loader(self) -> EpochLoader:
        """The whole of `dataset_valid`."""
        return self.test_loader

    def loaders(self) -> dict[str, EpochLoader]:
        """The training data."""
        return {"train": self.train_loader}

    def train_one_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over `dataset_train`, a fresh path for each batch."""
        self.set_training(True)
        meters = AverageMeterGroup()
        for raw in self.train_loader:
            self.decide()
            self.weight_step(self.split(raw), meters, epoch)
        return meters.averages()
