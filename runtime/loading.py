"""Data loaders whose order of examples is a state that can be saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from nascompile.compiler.errors import NascompileError


class EpochLoader:
    """Batches of the examples `indices` of `dataset` (None: all), in a new order each pass if `shuffle`.

    Each pass draws its order from `generator`, so saving the generator between passes saves the order of all
    that follow. `workers` is the number of loading processes, at most one a processor.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        workers: int,
        generator: torch.Generator,
        indices: torch.Tensor | None = None,
        shuffle: bool = True,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.generator = generator
        self.indices = indices
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": min(workers, len(os.sched_getaffinity(0))),
            "shuffle": shuffle,
            "pin_memory": pin_memory,
        }

    def _loader(self) -> DataLoader[Any]:
        data = self.dataset if self.indices is None else Subset(self.dataset, self.indices.tolist())
        return DataLoader(data, generator=self.generator, **self._options)

    def __iter__(self) -> Iterator[Any]:
        """One pass."""
        return iter(self._loader())

    def __len__(self) -> int:
        """The number of batches of a pass."""
        return len(self._loader())

    def forever(self) -> Iterator[Any]:
        """Pass after pass, without an end."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """The order of the passes to come, and which examples are in them."""
        return {
            "generator": self.generator.get_state(),
            "indices": self.indices,
            "examples": size_of(self.dataset, ""),
        }

    def why_not(self, state: dict[str, Any]) -> str | None:
        """Why `state` cannot be loaded, or None."""
        examples = size_of(self.dataset, "")
        if state["examples"] != examples:
            return f"it was made with {state['examples']} examples, there are {examples}"
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.generator.set_state(state["generator"])
        self.indices = state["indices"]


def size_of(dataset: Any, name: str) -> int:
    """The number of examples; raises NascompileError when `dataset` does not say or has none."""
    try:
        size = len(dataset)
    except TypeError as error:
        raise NascompileError(
            f"{name} is a {type(dataset).__name__} without a length; expected a dataset with one"
        ) from error
    if size == 0:
        raise NascompileError(f"{name} is empty, expected at least one example")
    return size


def split_indices(
    dataset: Any, fraction: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random parts of the training examples: `fraction` of them, and the rest; neither is empty."""
    size = size_of(dataset, "dataset_train")
    if size < 2:
        raise NascompileError(
            f"dataset_train has {size} example; expected at least 2, to split it for the search"
        )
    first = min(max(int(size * fraction), 1), size - 1)
    order = torch.randperm(size, generator=generator)
    return order[:first], order[first:]
