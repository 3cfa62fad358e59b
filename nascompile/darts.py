"""NNI's import path for DARTS."""

from nascompile.runtime.darts import DartsTrainer
from nascompile.runtime.darts_mutator import DartsMutator

__all__ = ["DartsMutator", "DartsTrainer"]
