"""NNI's import path for ENAS."""

from nascompile.runtime.enas import EnasTrainer
from nascompile.runtime.enas_mutator import EnasMutator

__all__ = ["EnasMutator", "EnasTrainer"]
