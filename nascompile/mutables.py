"""NNI's import path for the mutables."""

from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable, MutableScope

__all__ = ["InputChoice", "LayerChoice", "Mutable", "MutableScope"]
