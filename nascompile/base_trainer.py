"""NNI's import path for the interface of all trainers."""

from nascompile.runtime.base_trainer import BaseTrainer

__all__ = ["BaseTrainer"]
