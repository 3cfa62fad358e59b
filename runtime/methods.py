"""The search methods by name: which trainer each is, and how the command line's settings become its
arguments.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.callbacks import Callback
from nascompile.runtime.ingredients import Ingredients
from nascompile.runtime.job_settings import Settings
from nascompile.runtime.model_file import ModelFile, ModelFileError
from nascompile.runtime.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A search method. `is_weighted`: it adds up the outputs of all candidates, so their shapes have to
    agree.
    """

    name: str
    module: str
    trainer: str
    is_weighted: bool = False
    has_reward: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


METHODS: tuple[Method, ...] = (
    Method(name="darts", module="darts", trainer="DartsTrainer", is_weighted=True),
    Method(
        name="darts-unrolled",
        module="darts",
        trainer="DartsTrainer",
        is_weighted=True,
        arguments={"unrolled": True},
    ),
    Method(name="enas", module="enas", trainer="EnasTrainer", has_reward=True),
    Method(name="random", module="random_search", trainer="RandomTrainer", has_reward=True),
)


def find_method(name: str) -> Method:
    """The method of a name; raises NascompileError that lists the known ones."""
    for method in METHODS:
        if method.name == name:
            return method
    raise NascompileError(f"unknown method {name!r}; known: {', '.join(method.name for method in METHODS)}")


def make_trainer(
    method: Method,
    file: ModelFile,
    ingredients: Ingredients,
    optimizer: Optimizer,
    settings: Settings,
    *,
    callbacks: Sequence[Callback],
    folder: Path,
) -> Trainer:
    """The trainer of a search. Raises ModelFileError for `search_options` that the trainer does not know."""
    trainer = getattr(importlib.import_module(f"nascompile.runtime.{method.module}"), method.trainer)
    arguments: dict[str, Any] = {
        "model": ingredients.model,
        "loss": ingredients.loss,
        "metrics": ingredients.metrics,
        "optimizer": optimizer,
        "num_epochs": settings.epochs,
        "dataset_train": ingredients.dataset_train,
        "dataset_valid": ingredients.dataset_valid,
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "device": None if settings.device == "auto" else settings.device,
        "callbacks": list(callbacks),
        "compile": settings.compile,
        "precision": settings.precision,
        "seed": settings.seed,
        "folder": folder,
        **method.arguments,
    }
    if method.has_reward:
        arguments["reward_function"] = ingredients.reward_function
    return trainer(**arguments, **_further(method, trainer, file, arguments))


def _further(method: Method, trainer: type, file: ModelFile, given: Mapping[str, Any]) -> dict[str, Any]:
    options = file.value("search_options") or {}
    if not isinstance(options, Mapping) or not all(isinstance(value, Mapping) for value in options.values()):
        raise ModelFileError(
            f"{file.path}: 'search_options' is {options!r}, expected a dict: method to a dict of arguments"
        )
    for name in options:
        find_method(name)
    known = [
        name for name in inspect.signature(trainer).parameters if name not in given and name != "mutator"
    ]
    further = dict(options.get(method.name, {}))
    for name in further:
        if name not in known:
            raise ModelFileError(
                f"{file.path}: search_options[{method.name!r}] has {name!r}; {trainer.__name__} takes: "
                f"{', '.join(sorted(known))}"
            )
    return further
