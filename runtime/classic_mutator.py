"""Classic NAS: a model file asks for its next architecture; without a tuner, the first of everything."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nascompile.compiler.architecture import search_space
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.mutator import Mutator


class ClassicMutator(Mutator):
    """Decides for the first: layer 0, and the first `n_chosen` inputs (one where `n_chosen` is None)."""

    def sample_search(self) -> dict[str, Any]:
        """The first candidates: a boolean tensor for every key."""
        return {key: _first(choice) for key, choice in self.choices_by_key.items()}

    def sample_final(self) -> dict[str, Any]:
        """The same as `sample_search`."""
        return self.sample_search()


def _first(choice: LayerChoice | InputChoice) -> torch.Tensor:
    count = choice.n_chosen if isinstance(choice, InputChoice) and choice.n_chosen is not None else 1
    return torch.arange(len(choice)) < count


def get_and_apply_next_architecture(model: nn.Module) -> None:
    """Bind `model` to the next architecture to try. Nothing is pruned.

    With the environment variable NNI_GEN_SEARCH_SPACE set, the search space is written to the file it names
    and the process exits. Otherwise the architecture of `ClassicMutator` is applied. Raises NascompileError
    when NNI_PLATFORM asks for a tuner, and when the search space cannot be written.
    """
    destination = os.environ.get("NNI_GEN_SEARCH_SPACE")
    if destination:
        text = json.dumps(search_space(model), indent=2, sort_keys=True)
        try:
            Path(destination).write_text(text, encoding="utf-8")
        except OSError as error:
            raise NascompileError(
                f"search space cannot be written to {destination!r}: {error.strerror}"
            ) from error
        sys.exit(0)
    platform = os.environ.get("NNI_PLATFORM")
    if platform not in (None, "", "unittest"):
        raise NascompileError(
            f"NNI_PLATFORM is {platform!r}: tuner platforms are not supported; unset it to run standalone "
            "(the first candidate of every choice)"
        )
    ClassicMutator(model).reset()
