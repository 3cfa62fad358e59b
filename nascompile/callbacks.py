"""NNI's import path for callbacks."""

from nascompile.runtime.callbacks import (
    ArchitectureCheckpoint,
    Callback,
    LRSchedulerCallback,
    ModelCheckpoint,
)

__all__ = ["ArchitectureCheckpoint", "Callback", "LRSchedulerCallback", "ModelCheckpoint"]
