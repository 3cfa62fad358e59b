"""What every trainer can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class BaseTrainer(ABC):
    """Searches an architecture: trains, validates, exports the result, and saves its state."""

    @abstractmethod
    def train(self, validate: bool = True) -> None:
        """Run the search."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measure the current state on the validation data."""

    @abstractmethod
    def export(self, file: str | Path) -> None:
        """Write the final architecture as JSON."""

    @abstractmethod
    def checkpoint(self, folder: str | Path | None = None) -> Path:
        """Save everything that a resumption needs."""
