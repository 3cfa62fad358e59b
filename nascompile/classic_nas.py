"""NNI's import path for classic (trial by trial) NAS."""

from nascompile.runtime.classic_mutator import ClassicMutator, get_and_apply_next_architecture

__all__ = ["ClassicMutator", "get_and_apply_next_architecture"]
