"""What the searches that sample whole architectures share: the end, where the best of several is kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.enas_mutator import EnasMutator
from nascompile.runtime.loading import EpochLoader
from nascompile.runtime.random_mutator import RandomMutator
from nascompile.runtime.randomness import untouched_randomness
from nascompile.runtime.ranking import best_of
from nascompile.runtime.trainer import Trainer


class SamplingTrainer(Trainer):
    """Base of the searches whose mutator samples architectures.

    When the epochs are done, or when `export` asks earlier, `samples` different architectures are drawn and
    the one with the highest mean reward (without `reward_function`: the lowest loss) on `ranking_loader`
    becomes the final one. Deriving draws random numbers of its own and changes nothing in the run.
    """

    mutator: RandomMutator | EnasMutator

    def __init__(
        self, *args: Any, reward_function: Callable[[Any, Any], Any] | None, samples: int, **options: Any
    ) -> None:
        if samples < 1:
            raise NascompileError(f"samples is {samples}, expected at least 1")
        if reward_function is not None and not callable(reward_function):
            raise NascompileError(
                f"reward_function is a {type(reward_function).__name__}, "
                "expected a callable (logits, target) -> number"
            )
        super().__init__(*args, **options)
        self.reward_function = reward_function
        self.samples = samples
        #: (epoch, masks, score) of the architecture that was derived last
        self.derived: tuple[int, dict[str, Tensor], float] | None = None

    @property
    @abstractmethod
    def ranking_loader(self) -> EpochLoader:
        """The data on which architectures are compared."""

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Forget what was derived from the state before."""
        self.derived = None
        self.mutator.keep(None)

    def finish(self) -> None:
        """Derive the final architecture."""
        self.derive()

    def derive(self) -> dict[str, Tensor]:
        """The final architecture as masks; `mutator.export()` gives the same from now on."""
        done = len(self.history)
        if self.derived is None or self.derived[0] != done:
            self.mutator.keep(None)
            with untouched_randomness():
                masks, score = best_of(self.mutator.sample_final, self._score, self.samples)
            self.derived = (done, masks, score)
        self.mutator.keep(self.derived[1])
        return dict(self.derived[1])

    def _score(self, masks: dict[str, Tensor]) -> float:
        self.mutator.decide(masks)
        if self.reward_function is None:
            return -self.evaluate(self.ranking_loader)["loss"]
        return self.evaluate(self.ranking_loader, self._reward)["reward"]

    def _reward(self, logits: Any, target: Any) -> dict[str, Any]:
        assert self.reward_function is not None
        return {"reward": self.reward_function(logits, target)}

    def export(self, file: str | Path) -> None:
        """Derive, and write the architecture as JSON."""
        self.derive()
        super().export(file)
