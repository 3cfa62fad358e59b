"""What a search needs besides its settings: model, data, loss, metrics, optimizer, with defaults that are
said aloud.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Subset, default_collate

from nascompile.compiler.space import choices
from nascompile.runtime.batches import split_batch
from nascompile.runtime.model_file import ModelFile, ModelFileError, is_factory, required_arguments

AUX_WEIGHT = 0.4
"""Weight of the loss of auxiliary logits (DARTS, section 3.1)."""

Metrics = Callable[[Any, Any], Any]


@dataclass
class Ingredients:
    """Everything the model file gives, or its defaults, in usable form.

    `example_inputs` is the tuple of the model's positional arguments. `new_optimizer` makes an optimizer for
    the supernet or for a network pruned from it.
    """

    model: nn.Module
    example_inputs: tuple[Any, ...]
    dataset_train: Dataset[Any]
    dataset_valid: Dataset[Any]
    dataset_test: Dataset[Any] | None
    loss: Callable[[Any, Any], Tensor]
    metrics: Metrics
    reward_function: Callable[[Any, Any], float]
    new_optimizer: Callable[[nn.Module], Optimizer]

    def measure(self, output: Any, target: Any) -> dict[str, Any]:
        """The metrics as a dict; a single number is called "metric"."""
        found = self.metrics(output, target)
        return dict(found) if isinstance(found, Mapping) else {"metric": found}

    def training_loss(self, output: Any, target: Any) -> Tensor:
        """The loss, with the share of auxiliary logits where the network returns `(logits, auxiliary
        logits)`.
        """
        logits, auxiliary = split_output(output)
        loss = self.loss(logits, target)
        return loss if auxiliary is None else loss + AUX_WEIGHT * self.loss(auxiliary, target)


def split_output(output: Any) -> tuple[Any, Any]:
    """(logits, auxiliary logits or None) of what a network returns."""
    return output if isinstance(output, tuple) and len(output) == 2 else (output, None)


def gather(file: ModelFile, *, seed: int, batch_size: int) -> Ingredients:
    """All ingredients of a search. Raises ModelFileError for what is missing or unusable."""
    model = build_supernet(file)
    train = _dataset(file, "dataset_train", required=True)
    valid = _dataset(file, "dataset_valid")
    if valid is None:
        train, valid = _split(file, train, seed)
    test = _dataset(file, "dataset_test")
    if test is None:
        file.notes.append("no dataset_test: accuracy is that on dataset_valid")
    example = _example_inputs(file, model, train, batch_size)
    loss = _callable(file, "loss")
    if loss is None:
        loss = nn.CrossEntropyLoss()
        file.notes.append("loss: CrossEntropyLoss")
    metrics = _callable(file, "metrics")
    if metrics is None:
        metrics = top1_accuracy
        file.notes.append("metrics: top-1 accuracy")
    return Ingredients(
        model=model,
        example_inputs=example,
        dataset_train=train,
        dataset_valid=valid,
        dataset_test=test,
        loss=loss,
        metrics=metrics,
        reward_function=_callable(file, "reward_function") or first_metric(metrics),
        new_optimizer=optimizer_factory(file),
    )


def build_supernet(file: ModelFile, *, need_choices: bool = True) -> nn.Module:
    """The model of the file. Raises ModelFileError when it has no choices though they are needed."""
    model = file.build_model()
    if need_choices and not choices(model):
        raise ModelFileError(
            f"{file.path}: {file.model_name!r} ({type(model).__name__}) has no choices to search; it needs "
            "at least one LayerChoice or InputChoice, created in __init__"
        )
    return model


def example_of(file: ModelFile, model: nn.Module) -> tuple[Any, ...]:
    """The example inputs alone, for commands that do not train: from the file, else one sample of its
    training data.
    """
    if not file.defines("example_inputs") and not file.defines("dataset_train"):
        raise ModelFileError(
            f"{file.path}: needs `example_inputs` (a tensor or a tuple of arguments of the model), or "
            f"`dataset_train` to take them from. The file defines: {file.contents()}"
        )
    dataset = None if file.defines("example_inputs") else _dataset(file, "dataset_train")
    return _example_inputs(file, model, dataset, 1)


def top1_accuracy(output: Any, target: Tensor) -> dict[str, float]:
    """The share of samples whose largest logit (dimension 1) is at the target class."""
    return {"accuracy": (output.argmax(dim=1) == target).float().mean().item()}


def first_metric(metrics: Metrics) -> Callable[[Any, Any], float]:
    """A reward: the first of the metrics."""

    def reward(output: Any, target: Any) -> float:
        found = metrics(output, target)
        return float(next(iter(found.values())) if isinstance(found, Mapping) else found)

    return reward


def optimizer_factory(file: ModelFile) -> Callable[[nn.Module], Optimizer]:
    """How to make the file's optimizer for a model; raises ModelFileError when it is not an optimizer."""
    found = file.get("optimizer")
    if found is None:
        file.notes.append("optimizer: SGD, learning rate 0.025, momentum 0.9, weight decay 3e-4")
        return lambda model: torch.optim.SGD(model.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    if isinstance(found, Optimizer) or (is_factory(found) and not isinstance(found, type)):
        return lambda model: _rebuild(file, found, model)
    takes_parameters = isinstance(found, type) and issubclass(found, Optimizer)

    def make(model: nn.Module) -> Optimizer:
        argument = model.parameters() if takes_parameters else model
        return _checked(file, file.call("optimizer", found, argument))

    if not callable(found) or (not takes_parameters and required_arguments(found) not in (1, None)):
        raise ModelFileError(
            f"{file.path}: 'optimizer' is {_kind(found)}, expected a torch.optim.Optimizer or a function "
            "that takes the model (or nothing) and returns one"
        )
    return make


def _rebuild(file: ModelFile, found: Any, model: nn.Module) -> Optimizer:
    # an optimizer that exists already belongs to the supernet; for another network, one like it is made
    optimizer = _checked(file, file.call("optimizer", found) if is_factory(found) else found)
    mine = {id(p) for p in model.parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held and held <= mine:
        return optimizer
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {
        name: value
        for name, value in optimizer.param_groups[0].items()
        if name in accepted and name != "params"
    }
    return type(optimizer)(model.parameters(), **settings)


def _checked(file: ModelFile, optimizer: Any) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise ModelFileError(
            f"{file.path}: 'optimizer' is {_kind(optimizer)}, expected a torch.optim.Optimizer"
        )
    return optimizer


def _dataset(file: ModelFile, name: str, *, required: bool = False) -> Any:
    if not file.defines(name):
        if not required:
            return None
        raise ModelFileError(
            f"{file.path}: no data to search with; define `{name}`, a data set of (input, target) pairs. The "
            f"file defines: {file.contents()}"
        )
    dataset = file.value(name)
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise ModelFileError(
            f"{file.path}: {name!r} is {_kind(dataset)}, expected a data set with len() and items"
        )
    if len(dataset) == 0:
        raise ModelFileError(f"{file.path}: {name!r} is empty, expected at least one (input, target) pair")
    return dataset


def _split(file: ModelFile, dataset: Any, seed: int) -> tuple[Any, Any]:
    count = len(dataset)
    if count < 2:
        raise ModelFileError(
            f"{file.path}: 'dataset_train' has {count} sample, too few to keep some for validation"
        )
    n_valid = max(1, count // 10)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    file.notes.append(f"no dataset_valid: {n_valid} of the {count} training samples are kept for validation")
    return Subset(dataset, order[n_valid:]), Subset(dataset, order[:n_valid])


def _example_inputs(file: ModelFile, model: nn.Module, dataset: Any, batch_size: int) -> tuple[Any, ...]:
    if file.defines("example_inputs"):
        return _as_arguments(file, file.value("example_inputs"))
    file.notes.append("example_inputs: the first batch of dataset_train")
    count = min(batch_size, len(dataset))
    return _arguments(file, model, [file.call("dataset_train", lambda i=i: dataset[i]) for i in range(count)])


def _arguments(file: ModelFile, model: nn.Module, samples: list[Any]) -> tuple[Any, ...]:
    try:
        batch = split_batch(default_collate(samples), model)
    except (TypeError, RuntimeError) as error:
        raise ModelFileError(
            f"{file.path}: samples of 'dataset_train' do not form a batch: {' '.join(str(error).split())}"
        ) from error
    # named inputs in the order of the model's own arguments
    return (
        inspect.signature(model.forward).bind(*batch.args, **batch.kwargs).args
        if batch.kwargs
        else batch.args
    )


def _as_arguments(file: ModelFile, found: Any) -> tuple[Any, ...]:
    if isinstance(found, Tensor | dict):
        return (found,)
    if isinstance(found, list | tuple):
        return tuple(found)
    raise ModelFileError(
        f"{file.path}: 'example_inputs' is {_kind(found)}, expected a tensor or a tuple of arguments"
    )


def _callable(file: ModelFile, name: str) -> Any:
    found = file.value(name)
    if found is not None and not callable(found):
        raise ModelFileError(
            f"{file.path}: {name!r} is {_kind(found)}, expected a function of (output, target)"
        )
    return found


def _kind(found: Any) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
