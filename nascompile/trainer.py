"""NNI's import path for the base of all trainers."""

from nascompile.runtime.trainer import Trainer

__all__ = ["Trainer"]
