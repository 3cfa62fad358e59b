"""NNI's import path for the mask-driven mutator."""

from nascompile.compiler.mutator import Mutator

__all__ = ["Mutator"]
