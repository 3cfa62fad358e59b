"""NNI's import path for random decisions, and random search."""

from nascompile.runtime.random_mutator import RandomMutator
from nascompile.runtime.random_search import RandomTrainer

__all__ = ["RandomMutator", "RandomTrainer"]
