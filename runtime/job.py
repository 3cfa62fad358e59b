"""The search job behind `nascompile model.py`: from the user's file to the lean network, its exports and its
figures.
"""

from __future__ import annotations

import copy
import json
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from nascompile.compiler.architecture import resolve
from nascompile.compiler.draw import draw
from nascompile.compiler.explain import explain
from nascompile.compiler.measure import check_weighted, profile_choices
from nascompile.compiler.prune import prune
from nascompile.compiler.space import candidate_names, choices
from nascompile.runtime.artefacts import write_lean
from nascompile.runtime.batches import to_device
from nascompile.runtime.callbacks import Callback
from nascompile.runtime.checkpoint import NAME as CHECKPOINT_FILE
from nascompile.runtime.ingredients import Ingredients, gather
from nascompile.runtime.job_folder import (
    ARCHITECTURE,
    CHECKPOINT,
    PLOTS,
    RETRAIN,
    SETTINGS,
    SUMMARY,
    JobFolder,
)
from nascompile.runtime.job_settings import Settings, SettingsError
from nascompile.runtime.loading import size_of
from nascompile.runtime.methods import find_method, make_trainer
from nascompile.runtime.model_file import ModelFile
from nascompile.runtime.plots import plot_decisions, plot_history
from nascompile.runtime.randomness import seed_everything
from nascompile.runtime.report import Figures, measure_network
from nascompile.runtime.retrain import Progress, Retraining
from nascompile.runtime.trainer import Trainer

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """What a job tells of itself."""

    def say(self, topic: str, line: str) -> None:
        """One fact, worth a line."""

    def space(self, explanation: Any) -> None:
        """The explanation of the search space."""

    def begin(self, task: str, epochs: int, done: int, steps: int) -> None:
        """A task of so many epochs of so many steps starts, with some epochs done before."""

    def step(self) -> None:
        """One step of the task."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """One epoch of the task, with its averages."""

    def end(self) -> None:
        """The task is over."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The outcome of a job: the figures of both networks, and what was written, most useful first."""

    method: str
    batch_size: int
    supernet: Figures
    lean: Figures
    files: list[Path]


class _Steps(Callback):
    """Passes the steps of a trainer on to the observer."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_batch_end(self, epoch: int) -> None:
        self._observer.step()

    def on_epoch_end(self, epoch: int) -> None:
        self._observer.epoch(self.trainer.history[-1])


class SearchJob:
    """One search of the space in `path` with its results in `folder`.

    `given` holds the settings that the user chose (None: not chosen). `resume` continues the run in the
    folder, `overwrite` deletes it first, `versions` goes into the summary. Raises NascompileError for
    everything the user can mend; nothing is written before the model file, its data and its search space have
    been found usable.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        observer: Observer,
        given: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = JobFolder(folder)
        self.observer = observer
        self._resume = resume
        if resume:
            stored = Settings.from_json(self.folder.reopen()["settings"])
            self.settings = stored.resumed_with(given)
        else:
            self.settings = Settings.of(given)
            self.folder.check_free(overwrite=overwrite)
        self.method = find_method(self.settings.method)
        self._overwrite = overwrite
        self._path = path
        self._versions = dict(versions or {})

    def run(self) -> Summary:
        """The whole line; returns the figures of supernet and lean network."""
        settings = self.settings
        seed_everything(settings.seed)
        file = ModelFile(self._path)
        ingredients = gather(file, seed=settings.seed, batch_size=settings.batch_size)
        self._look_at_space(file, ingredients)
        trainer = self._trainer(file, ingredients)
        content = {"file": str(self._path), "settings": settings.to_json()}
        if self._resume:
            self.folder.write_json(SETTINGS, content)
        else:
            self.folder.create(content, overwrite=self._overwrite)
        with self.folder.logging_to(logging.getLogger("nascompile")):
            logger.info("%s %s", "resume" if self._resume else "start", json.dumps(content))
            for note in file.notes:
                logger.info("default  %s", note)
            return self._search_and_prune(trainer, ingredients)

    def _look_at_space(self, file: ModelFile, ingredients: Ingredients) -> None:
        if self.method.is_weighted:
            check_weighted(profile_choices(ingredients.model, ingredients.example_inputs))
        example = ingredients.example_inputs
        if not file.defines("example_inputs"):
            # sizes are told for one sample
            example = tree_map_only(torch.Tensor, lambda tensor: tensor[:1], example)
        self.observer.space(explain(ingredients.model, example, gains=None))
        parts = {
            "train": ingredients.dataset_train,
            "validation": ingredients.dataset_valid,
            "test": ingredients.dataset_test,
        }
        sizes = [f"{size_of(data, name):,} {name}" for name, data in parts.items() if data is not None]
        self.observer.say("data", " · ".join(sizes))
        for note in file.notes:
            self.observer.say("default", note)

    def _search_and_prune(self, trainer: Trainer, ingredients: Ingredients) -> Summary:
        self._search(trainer)
        architecture = trainer.mutator.export()
        paths = [self.folder.write_json(ARCHITECTURE, dict(sorted(architecture.items())))]
        lean, retraining = self._lean(trainer, ingredients, architecture)
        example = to_device(ingredients.example_inputs, torch.device("cpu"))
        paths += write_lean(self.folder, copy.deepcopy(lean).cpu(), example, self.settings.formats)
        before, after = self._measure(trainer, ingredients, lean)
        for name, figures in (("supernet", before), ("lean", after)):
            logger.info("%s  %s", name, json.dumps(asdict(figures)))
        paths += self._draw(trainer, ingredients, architecture, retraining)
        content = {
            "settings": self.settings.to_json(),
            "versions": {**self._versions, "python": platform.python_version(), "torch": torch.__version__},
            "architecture": architecture,
            "supernet": asdict(before),
            "lean": asdict(after),
            "search": trainer.history,
            "retraining": retraining,
        }
        paths.append(self.folder.write_json(SUMMARY, content))
        return Summary(self.method.name, self.settings.batch_size, before, after, paths)

    def _trainer(self, file: ModelFile, ingredients: Ingredients) -> Trainer:
        """The trainer, where the run stopped if it is resumed."""
        trainer = make_trainer(
            self.method,
            file,
            ingredients,
            ingredients.new_optimizer(ingredients.model),
            self.settings,
            callbacks=[_Steps(self.observer)],
            folder=self.folder / CHECKPOINT,
        )
        if self._resume and (self.folder / CHECKPOINT / CHECKPOINT_FILE).is_file():
            trainer.resume()
            if trainer.epoch > self.settings.epochs:
                raise SettingsError(
                    f"epochs is {self.settings.epochs}, but this run has done {trainer.epoch} already"
                )
        return trainer

    def _search(self, trainer: Trainer) -> None:
        self.observer.begin("search", self.settings.epochs, trainer.epoch, trainer.steps_per_epoch)
        trainer.train()
        self.observer.end()

    def _lean(
        self, trainer: Trainer, ingredients: Ingredients, architecture: Mapping[str, Any]
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The lean network, retrained if asked for, and the history of its training."""
        fresh = self.settings.retrain > 0 and not self.settings.inherit
        # another seed than the supernet's, or fresh weights would be those it started from
        seed_everything(self.settings.seed + 1)
        example = to_device(ingredients.example_inputs, trainer.device)
        lean = prune(ingredients.model, architecture, example, weights="fresh" if fresh else "inherit")
        if self.settings.retrain == 0:
            return lean, []
        retraining = Retraining(lean, architecture, ingredients, self.settings, self.folder / RETRAIN)
        retraining.resume()
        self.observer.begin("retrain", self.settings.retrain, len(retraining.history), len(retraining))
        retraining.run(Progress(step=self.observer.step, epoch=self.observer.epoch))
        self.observer.end()
        return lean, retraining.history

    def _measure(
        self, trainer: Trainer, ingredients: Ingredients, lean: nn.Module
    ) -> tuple[Figures, Figures]:
        self.observer.say("measure", "accuracy, size and time of both networks")
        trainer.mutator.reset()
        supernet = trainer.model if trainer.compiled is None else trainer.compiled
        measure = partial(
            measure_network,
            ingredients=ingredients,
            settings=self.settings,
            acceleration=trainer.acceleration,
        )
        return measure(supernet), measure(lean)

    def _draw(
        self,
        trainer: Trainer,
        ingredients: Ingredients,
        architecture: Mapping[str, Any],
        retraining: list[dict[str, Any]],
    ) -> list[Path]:
        """The pictures of the run; returns their paths."""
        title = f"{self._path.name} · {self.method.name}"
        model = ingredients.model
        names = {key: candidate_names(choice) for key, choice in choices(model).items()}
        chosen = resolve(model, architecture)
        example = to_device(ingredients.example_inputs, trainer.device)
        pictures: dict[str, Callable[[Path], object]] = {
            "search.png": partial(plot_history, trainer.history, title=f"{title}: search"),
            "decisions.png": partial(
                plot_decisions, trainer.decisions, names, chosen, title=f"{title}: decisions"
            ),
            **{
                f"architecture{suffix}": lambda path: draw(model, path, example, architecture=architecture)
                for suffix in (".svg", ".png")
            },
        }
        if retraining:
            pictures["retrain.png"] = partial(
                plot_history, retraining, title=f"{title}: retraining the lean network"
            )
        return [self.folder.publish(f"{PLOTS}/{name}", write) for name, write in pictures.items()]
