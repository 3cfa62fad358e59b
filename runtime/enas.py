"""ENAS: a controller trained by policy gradient, sampling paths of a supernet with shared weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.data import Dataset

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.callbacks import Callback
from nascompile.runtime.enas_mutator import EnasMutator
from nascompile.runtime.loading import EpochLoader, split_indices
from nascompile.runtime.meters import AverageMeterGroup
from nascompile.runtime.randomness import new_generator
from nascompile.runtime.sampling_trainer import SamplingTrainer
from nascompile.runtime.trainer import Loss, Metrics, RunOptions


class EnasTrainer(SamplingTrainer):
    """ENAS (Pham 2018, arXiv 1802.03268) with the signature and defaults of NNI 1.x.

    A random 90 % of `dataset_train` trains the weights, 10 % rewards the controller; `dataset_valid` is for
    validation only. An epoch has `child_steps` steps of the weights, each with a sampled architecture, then
    `mutator_steps` steps of the controller (Adam, `mutator_lr`), each over `mutator_steps_aggregate` samples.
    Both phases start a new pass over their data, and as many passes as they need.

    The reward of a sample is `reward_function(logits, target)` on one batch, in evaluation mode for macro and
    micro spaces alike, plus `entropy_weight` times the policy's entropy, which is detached: it shifts the
    reward and has no gradient of its own. The baseline is a running average with `baseline_decay` over all
    epochs, and the plain mean of the rewards as long as that forgets faster (with a decay of 0.999 a baseline
    that starts anywhere else is wrong for a thousand samples). A sample is compared with the baseline of
    those before it, which keeps the gradient unbiased (the reference updates first, which only scales the
    advantage). `skip_weight` weighs the skip penalty of `EnasMutator`. Gradients of both are clipped to norm
    5.

    At the end `samples` architectures are sampled and the one with the best mean reward on the 10 % is kept.
    `test_arc_per_epoch` is how many samples a validation averages over. The controller stays on the CPU: it
    is a sequence of very small operations.
    """

    default_mutator = EnasMutator
    mutator: EnasMutator

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        metrics: Metrics | None,
        reward_function: Callable[[Any, Any], Any],
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        dataset_train: Dataset[Any],
        dataset_valid: Dataset[Any],
        mutator: EnasMutator | None = None,
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        callbacks: Sequence[Callback] | None = None,
        entropy_weight: float = 0.0001,
        skip_weight: float = 0.8,
        baseline_decay: float = 0.999,
        child_steps: int = 500,
        mutator_lr: float = 0.00035,
        mutator_steps_aggregate: int = 20,
        mutator_steps: int = 50,
        aux_weight: float = 0.4,
        test_arc_per_epoch: int = 1,
        *,
        samples: int = 10,
        **options: Unpack[RunOptions],
    ) -> None:
        if min(child_steps, mutator_steps_aggregate, test_arc_per_epoch) < 1 or mutator_steps < 0:
            raise NascompileError(
                f"child_steps {child_steps}, mutator_steps_aggregate {mutator_steps_aggregate} and "
                f"test_arc_per_epoch {test_arc_per_epoch} have to be at least 1, "
                f"mutator_steps {mutator_steps} at least 0"
            )
        super().__init__(
            model, mutator, loss, metrics, optimizer, num_epochs, dataset_train, dataset_valid,
            batch_size, workers, device, log_frequency, callbacks,
            reward_function=reward_function, samples=samples, aux_weight=aux_weight, **options,
        )  # fmt: skip
        self.entropy_weight = entropy_weight
        self.skip_weight = skip_weight
        self.baseline_decay = baseline_decay
        self.baseline: float | None = None
        self.rewards_seen = 0
        self.child_steps = child_steps
        self.mutator_steps_aggregate = mutator_steps_aggregate
        self.mutator_steps = mutator_steps
        self.test_arc_per_epoch = test_arc_per_epoch
        self.mutator_optim = torch.optim.Adam(self.mutator.parameters(), lr=mutator_lr)
        for_weights, for_controller = split_indices(dataset_train, 0.9, new_generator())
        self.train_loader = self.make_loader(dataset_train, indices=for_weights)
        self.valid_loader = self.make_loader(dataset_train, indices=for_controller)

    @property
    def steps_per_epoch(self) -> int:
        """`child_steps`."""
        return self.child_steps

    @property
    def ranking_loader(self) -> EpochLoader:
        """The 10 % that reward the controller, in the order of the split."""
        return self.make_loader(self.dataset_train, indices=self.valid_loader.indices, shuffle=False)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers of the weights and of the controller."""
        return {"model": self.optimizer, "controller": self.mutator_optim}

    def loaders(self) -> dict[str, EpochLoader]:
        """The 90 % and the 10 %."""
        return {"train": self.train_loader, "valid": self.valid_loader}

    def extra_state(self) -> dict[str, Any]:
        """The baseline."""
        return {"baseline": self.baseline, "rewards_seen": self.rewards_seen}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the baseline."""
        super().load_extra_state(state)
        self.baseline = state["baseline"]
        self.rewards_seen = state["rewards_seen"]

    def train_one_epoch(self, epoch: int) -> dict[str, float]:
        """Train the weights, then the controller."""
        return {**self.train_weights(epoch), **self.train_controller()}

    def train_weights(self, epoch: int) -> dict[str, float]:
        """`child_steps` steps of the weights, each along a sampled path."""
        self.set_training(True)
        meters = AverageMeterGroup()
        batches = self.train_loader.forever()
        for _ in range(self.child_steps):
            with torch.no_grad():
                self.decide()
            self.weight_step(self.split(next(batches)), meters, epoch)
        return meters.averages()

    def train_controller(self) -> dict[str, float]:
        """`mutator_steps` steps of the controller."""
        self.set_training(False)
        meters = AverageMeterGroup()
        batches = self.valid_loader.forever()
        for _ in range(self.mutator_steps):
            self.controller_step(batches, meters)
        return meters.averages()

    def controller_step(self, batches: Iterator[Any], meters: AverageMeterGroup) -> None:
        """One step of REINFORCE, averaged over `mutator_steps_aggregate` samples."""
        self.mutator_optim.zero_grad(set_to_none=True)
        for _ in range(self.mutator_steps_aggregate):
            batch = self.split(next(batches))
            self.mutator.reset()
            with torch.no_grad():
                logits, _ = self.forward(batch)
                assert self.reward_function is not None
                reward = float(self.reward_function(logits, batch.target))
            entropy = float(self.mutator.sample_entropy)
            advantage = self._advantage(reward + self.entropy_weight * entropy)
            surrogate = (
                advantage * self.mutator.sample_log_prob + self.skip_weight * self.mutator.sample_skip_penalty
            )
            if surrogate.requires_grad:
                (surrogate / self.mutator_steps_aggregate).backward()
            meters.update({"reward": reward, "entropy": entropy, "controller_loss": surrogate})
        nn.utils.clip_grad_norm_(self.mutator.parameters(), 5.0)
        self.mutator_optim.step()

    def _advantage(self, reward: float) -> float:
        """The reward over the baseline, which then takes the reward in."""
        if self.baseline is None:
            self.baseline = reward
        advantage = reward - self.baseline
        decay = min(self.baseline_decay, self.rewards_seen / (self.rewards_seen + 1))
        self.baseline = decay * self.baseline + (1 - decay) * reward
        self.rewards_seen += 1
        return advantage

    @torch.no_grad()
    def validate_one_epoch(self, epoch: int) -> dict[str, float]:
        """The mean over `test_arc_per_epoch` sampled architectures, each on the whole of `dataset_valid`."""
        meters = AverageMeterGroup()
        for _ in range(self.test_arc_per_epoch):
            self.mutator.reset()
            meters.update(self.evaluate(self.test_loader))
        return meters.averages()
