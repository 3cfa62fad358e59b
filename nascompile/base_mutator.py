"""NNI's import path for the base class of mutators."""

from nascompile.compiler.mutator import BaseMutator

__all__ = ["BaseMutator"]
