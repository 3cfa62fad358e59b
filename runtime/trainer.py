"""The part all searches share: epochs, forward passes, measurements, callbacks, checkpoints."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.space import unwrap
from nascompile.runtime.acceleration import Acceleration
from nascompile.runtime.base_trainer import BaseTrainer
from nascompile.runtime.batches import Batch, split_batch, to_device
from nascompile.runtime.callbacks import Callback
from nascompile.runtime.checkpoint import write_text
from nascompile.runtime.decision_mean import DecisionMean
from nascompile.runtime.loading import EpochLoader, size_of
from nascompile.runtime.meters import AverageMeterGroup
from nascompile.runtime.randomness import new_generator, seed_everything, untouched_randomness
from nascompile.runtime.replaying import checked
from nascompile.runtime.trainer_state import load_state, save_state

logger = logging.getLogger(__name__)

Loss = Callable[[Any, Any], Tensor]
Metrics = Callable[[Any, Any], Any]


class RunOptions(TypedDict, total=False):
    """The keyword arguments of `Trainer` that every search passes on."""

    compile: bool
    cuda_graph: bool | None
    precision: str
    seed: int | None
    folder: str | Path | None


class Trainer(BaseTrainer):
    """Base class of the searches, with the signature of NNI 1.x; a subclass defines `train_one_epoch`.

    `loss(logits, target)` is any callable; `metrics(logits, target)` returns a dict of numbers, one number,
    or is None. How a batch splits into inputs and target is said at `nascompile.runtime.batches.split_batch`.
    A model that returns `(logits, aux_logits)` has `aux_weight` times the loss of the second added in
    training. `device=None` takes CUDA where there is one. `log_frequency` is the number of steps between two
    lines of the log (None: no lines).

    `compile=True` runs the model through `nascompile.compile`; parameters, optimizers and state dicts are
    those of `model` either way. On a GPU first-order DARTS replays its steps as CUDA graphs
    (`nascompile.runtime.captured_step`): with `cuda_graph=None` where all code of a step is known, with True
    also where losses, mutators or callbacks of your own depend on nothing but their arguments, with False
    never. `precision` is "no", "bf16" or "fp16". `seed` seeds Python's, NumPy's and torch's global generators
    before anything is drawn. With `folder`, the state is saved there before the first and after every epoch,
    so that a run that is interrupted can be resumed; nothing is written without it.

    `history` has a dict for every epoch (epoch, train_loss, train_<metric>, valid_loss, valid_<metric>),
    `decisions` the mean decision of every epoch: a list of floats for every key.
    """

    #: what makes the mutator when none is given
    default_mutator: ClassVar[Callable[[nn.Module], Mutator] | None] = None

    def __init__(
        self,
        model: nn.Module,
        mutator: Mutator | None,
        loss: Loss,
        metrics: Metrics | None,
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        dataset_train: Dataset[Any],
        dataset_valid: Dataset[Any],
        batch_size: int,
        workers: int,
        device: torch.device | str | None,
        log_frequency: int | None,
        callbacks: Sequence[Callback] | None,
        *,
        compile: bool = True,
        cuda_graph: bool | None = None,
        precision: str = "no",
        seed: int | None = None,
        folder: str | Path | None = None,
        aux_weight: float = 0.4,
    ) -> None:
        _check(num_epochs=num_epochs, batch_size=batch_size, workers=workers, log_frequency=log_frequency)
        _check_callables(loss, metrics)
        size_of(dataset_train, "dataset_train")
        size_of(dataset_valid, "dataset_valid")
        self.model = unwrap(model)
        if mutator is not None and mutator.model is not self.model:
            raise NascompileError(f"the {type(mutator).__name__} is bound to another model")
        self.acceleration = Acceleration(device, precision)
        self.device = self.acceleration.device
        self.model.to(self.device)
        self.loss = loss.to(self.device) if isinstance(loss, nn.Module) else loss
        self.metrics = metrics
        self.optimizer = optimizer
        self.num_epochs = num_epochs
        self.dataset_train = dataset_train
        self.dataset_valid = dataset_valid
        self.batch_size = batch_size
        self.workers = workers
        self.log_frequency = log_frequency
        self.callbacks = list(callbacks or [])
        self.aux_weight = aux_weight
        self.cuda_graph = checked(cuda_graph)
        self.replays = False  # steps, as CUDA graphs
        self.folder = None if folder is None else Path(folder)

        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.decisions: list[dict[str, list[float]]] = []
        self.epoch_metrics: dict[str, float] = {}
        self._decided = DecisionMean()
        self._prepared = self.acceleration.prepare(optimizer)
        if seed is not None:
            seed_everything(seed)
        self.test_loader = self.make_loader(dataset_valid, shuffle=False)
        self.mutator = self._new_mutator() if mutator is None else mutator
        try:
            self.compiled: nn.Module | None = self._compile(model) if compile else None
        except Exception:
            # a model that could not be compiled is as free as before
            if mutator is None:
                self.mutator.release()
            raise
        for callback in self.callbacks:
            callback.build(self.model, self.mutator, self)

    def _new_mutator(self) -> Mutator:
        make = type(self).default_mutator
        if make is None:
            raise NascompileError(f"{type(self).__name__} needs a mutator")
        return make(self.model)

    def _compile(self, model: nn.Module) -> nn.Module:
        if model is not self.model:
            return model
        from nascompile.compiler.compiled import compile as compile_model

        with untouched_randomness():
            example = self.split(next(iter(self.make_loader(self.dataset_train, shuffle=False))))
            return compile_model(self.model, None if example.kwargs else example.args)

    # ---- for subclasses

    @abstractmethod
    def train_one_epoch(self, epoch: int) -> dict[str, float] | None:
        """Train for one epoch; the averages of what was measured."""

    def validate_one_epoch(self, epoch: int) -> dict[str, float]:
        """The loss and metrics of the current decision on `dataset_valid`."""
        self.mutator.reset()
        return self.evaluate(self.test_loader)

    def finish(self) -> None:
        """Called when all epochs are done."""

    @property
    def steps_per_epoch(self) -> int:
        """How many batches (steps of the weights) an epoch has."""
        raise NotImplementedError(f"{type(self).__name__} must define steps_per_epoch")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimizers by name, for the checkpoint."""
        return {"model": self.optimizer}

    def loaders(self) -> dict[str, EpochLoader]:
        """All loaders that shuffle, by name, for the checkpoint."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """What else a checkpoint of this trainer keeps: tensors, numbers, lists, dicts."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` gave."""

    # ---- the public methods

    def train(self, validate: bool = True) -> None:
        """Run the epochs that are left; with `validate`, measure after each on `dataset_valid`."""
        if self.folder is not None and self.epoch < self.num_epochs:
            self.checkpoint()
        for epoch in range(self.epoch, self.num_epochs):
            self._one_epoch(epoch, validate)
            self.epoch = epoch + 1
            if self.folder is not None:
                self.checkpoint()
        self.finish()

    def _one_epoch(self, epoch: int, validate: bool) -> None:
        self.step = 0
        self._decided = DecisionMean()
        for callback in self.callbacks:
            callback.on_epoch_begin(epoch)
        measured = _prefixed("train_", self.train_one_epoch(epoch))
        if validate:
            measured |= _prefixed("valid_", self.validate_one_epoch(epoch))
        self.epoch_metrics = measured
        self.history.append({"epoch": epoch, **measured})
        self.decisions.append(self._decided.by_key())
        logger.info("epoch %d/%d  %s", epoch + 1, self.num_epochs, _line(measured))
        for callback in self.callbacks:
            callback.on_epoch_end(epoch)

    def validate(self) -> dict[str, float]:
        """The current loss and metrics on `dataset_valid`: {"loss": ..., <metric>: ...}."""
        return self.validate_one_epoch(-1) or {}

    def export(self, file: str | Path) -> None:
        """Write the final architecture as JSON, as `apply_fixed_architecture` and `prune` read it."""
        text = json.dumps(self.mutator.export(), indent=2, sort_keys=True) + "\n"
        write_text(file, text, "architecture")

    def checkpoint(self, folder: str | Path | None = None) -> Path:
        """Save everything a resumption needs into `folder` (default: the trainer's); the file written.

        Raises NascompileError when it cannot be written; an earlier checkpoint there is then still intact.
        """
        folder = self.folder if folder is None else folder
        if folder is None:
            raise NascompileError("checkpoint needs a folder: give one here or to the trainer")
        return save_state(self, folder)

    def resume(self, folder: str | Path | None = None) -> None:
        """Take up the state in `folder` (default: the trainer's); `train` then runs the epochs that are left.

        On a CPU the result equals that of the uninterrupted run bit for bit. Raises NascompileError, with
        nothing changed, when the checkpoint is missing, damaged, or of another trainer, model or data.
        """
        folder = self.folder if folder is None else folder
        if folder is None:
            raise NascompileError("resume needs a folder: give one here or to the trainer")
        load_state(self, folder)

    # ---- building blocks

    def make_loader(
        self, dataset: Dataset[Any], *, shuffle: bool = True, indices: Tensor | None = None
    ) -> EpochLoader:
        """Batches of (part of) a dataset, in an order of their own."""
        return EpochLoader(
            dataset,
            batch_size=self.batch_size,
            workers=self.workers,
            generator=new_generator(),
            indices=indices,
            shuffle=shuffle,
            pin_memory=self.device.type == "cuda",
        )

    def split(self, raw: Any) -> Batch:
        """A batch on the device, split into inputs and target."""
        return split_batch(to_device(raw, self.device), self.model)

    def set_training(self, mode: bool) -> None:
        """Training or evaluation mode, of the model and of its compiled form."""
        self.model.train(mode)
        if self.compiled is not None:
            self.compiled.train(mode)

    def decide(self) -> None:
        """Draw a decision and count it in the epoch's mean."""
        self.mutator.reset()
        self._decided.add(self.mutator.decision)

    def forward(self, batch: Batch) -> tuple[Any, Tensor]:
        """The logits, and the loss with the share of auxiliary logits, under the current decision."""
        network = self.model if self.compiled is None else self.compiled
        with self.acceleration.autocast():
            logits, aux = _split_output(network(*batch.args, **batch.kwargs))
            loss = self.loss(logits, batch.target)
            if aux is not None and self.model.training:
                loss = loss + self.aux_weight * self.loss(aux, batch.target)
        return logits, loss

    def measure(self, logits: Any, batch: Batch) -> dict[str, Any]:
        """The user's metrics as a dict; a single number is called "metric"."""
        if self.metrics is None:
            return {}
        with torch.no_grad():
            measured = self.metrics(logits, batch.target)
        return dict(measured) if isinstance(measured, Mapping) else {"metric": measured}

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the model and of its optimizer that want a gradient."""
        known = {id(p): p for p in self.model.parameters() if p.requires_grad}
        known |= {
            id(p): p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad
        }
        return list(known.values())

    def weight_step(self, batch: Batch, meters: AverageMeterGroup, epoch: int) -> None:
        """One step of the weights under the current decision, with callbacks, measurements and log."""
        for callback in self.callbacks:
            callback.on_batch_begin(epoch)
        self.after_step(batch, *self.update_weights(batch), meters, epoch)

    def update_weights(self, batch: Batch) -> tuple[Any, Tensor]:
        """Move the weights down the loss, gradients clipped to norm 5 as in NNI; the logits and the loss.

        Parameters that take no part keep `grad is None`, so neither momentum nor weight decay moves them.
        """
        parameters = self.trained_parameters()
        for parameter in parameters:
            parameter.grad = None
        logits, loss = self.forward(batch)
        # a sampled path may be without parameters
        if loss.requires_grad:
            self.acceleration.backward(loss, parameters)
            self.acceleration.clip(self._prepared, parameters, 5.0)
            self._prepared.step()
        return logits, loss

    def after_step(
        self, batch: Batch, logits: Any, loss: Tensor, meters: AverageMeterGroup, epoch: int
    ) -> None:
        """Measure a step of the weights, count it, and tell callbacks and log."""
        meters.update({"loss": loss, **self.measure(logits, batch)}, batch.size)
        self.step += 1
        for callback in self.callbacks:
            callback.on_batch_end(epoch)
        if self.log_frequency is not None and self.step % self.log_frequency == 0:
            logger.info(
                "epoch %d/%d step %d/%d  %s",
                epoch + 1,
                self.num_epochs,
                self.step,
                self.steps_per_epoch,
                meters,
            )

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterator[Any] | EpochLoader,
        more: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    ) -> dict[str, float]:
        """Averages over all examples of `batches`, in evaluation mode, under the current decision.

        `more(logits, target)` gives further values to average.
        """
        self.set_training(False)
        meters = AverageMeterGroup()
        for raw in batches:
            batch = self.split(raw)
            logits, loss = self.forward(batch)
            measured = {"loss": loss, **self.measure(logits, batch)}
            if more is not None:
                measured |= more(logits, batch.target)
            meters.update(measured, batch.size)
        return meters.averages()


def _split_output(output: Any) -> tuple[Any, Any]:
    if isinstance(output, tuple) and len(output) == 2:
        return output
    return output, None


def _prefixed(prefix: str, measured: dict[str, float] | None) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in (measured or {}).items()}


def _line(measured: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in measured.items())


def _check(**counts: int | None) -> None:
    for name, value in counts.items():
        least = 0 if name in ("num_epochs", "workers") else 1
        if value is None and name == "log_frequency":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise NascompileError(f"{name} is {value!r}, expected an integer of at least {least}")


def _check_callables(loss: Any, metrics: Any) -> None:
    if not callable(loss):
        raise NascompileError(
            f"loss is a {type(loss).__name__}, expected a callable (logits, target) -> tensor"
        )
    if metrics is not None and not callable(metrics):
        raise NascompileError(
            f"metrics is a {type(metrics).__name__}, expected a callable (logits, target) -> dict"
        )
