"""The decisions of DARTS: a softmax over candidates while searching, the strongest at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.mutator import Mutator, SoftDecision

logger = logging.getLogger(__name__)

# candidates that compete in the softmax but never enter a derived network (DARTS, section 2.4)
EMPTY_NAMES = frozenset({"none", "zero"})


class KeyedParameters(nn.Module):
    """A mapping from any string to a Parameter; unlike nn.ParameterDict, the string may contain dots."""

    def __setitem__(self, key: str, parameter: nn.Parameter) -> None:
        # past register_parameter, which refuses names that are attributes of a module, such as "type"
        self._parameters[_escape(key)] = parameter

    def __getitem__(self, key: str) -> nn.Parameter:
        name = _escape(key)
        if name not in self._parameters:
            raise KeyError(f"no parameter for {key!r}; there are: {', '.join(self) or 'none'}")
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _escape(key) in self._parameters

    def __iter__(self) -> Iterator[str]:
        return (name.replace("%2E", ".").replace("%25", "%") for name in self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def keys(self) -> list[str]:
        """The keys in order of insertion."""
        return list(self)

    def items(self) -> list[tuple[str, nn.Parameter]]:
        """Pairs of key and Parameter in order of insertion."""
        return [(key, self[key]) for key in self]


def _escape(key: str) -> str:
    return key.replace("%", "%25").replace(".", "%2E")


class DartsMutator(Mutator):
    """Architecture parameters of DARTS (Liu 2018, arXiv 1806.09055), with the semantics of NNI 1.x.

    `choices[key]` holds the logits alpha of a LayerChoice, float32, one for each candidate and a last one for
    "no output at all", which takes its share of the softmax without contributing. While searching every input
    of an InputChoice is used. A weight that is zero (its logit a hundred below the largest) leaves its
    candidate out on a CPU; on a GPU, where nobody waits to read it, the candidate runs and counts nothing.

    The final architecture takes the candidate of each LayerChoice with the largest probability, except one
    named "none" or "zero". An InputChoice with `n_chosen` keeps the inputs that come from the strongest
    LayerChoices (strength: the largest probability of a candidate that may be chosen; first come first on
    ties), and a LayerChoice that no InputChoice keeps although one lists it chooses nothing. An input without
    a LayerChoice key has strength 0.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.choices = KeyedParameters()
        for key, choice in self.choices_by_key.items():
            if isinstance(choice, LayerChoice):
                self.choices[key] = nn.Parameter(1e-3 * torch.randn(len(choice) + 1, dtype=torch.float32))
        for key, choice in self.choices_by_key.items():
            if isinstance(choice, InputChoice) and choice.n_chosen not in (None, len(choice)):
                unknown = [
                    index for index, source in enumerate(choice.choose_from) if source not in self.choices
                ]
                if unknown:
                    logger.warning(
                        "InputChoice %r: inputs %s do not name a LayerChoice in choose_from, so DARTS cannot "
                        "rank them; they have strength 0 when %d of %d inputs are kept",
                        key,
                        unknown,
                        choice.n_chosen,
                        len(choice),
                    )

    def probabilities(self, key: str) -> Tensor:
        """The weights of the candidates of a LayerChoice, float32; with the last slot they would sum to 1."""
        return torch.softmax(self.choices[key], dim=-1)[:-1]

    def sample_search(self) -> dict[str, Any]:
        """Differentiable weights for each LayerChoice, all inputs of each InputChoice."""
        masks = {
            key: self.probabilities(key)
            if isinstance(choice, LayerChoice)
            else torch.ones(len(choice), dtype=torch.bool)
            for key, choice in self.choices_by_key.items()
        }
        return SoftDecision(masks)

    @torch.no_grad()
    def sample_final(self) -> dict[str, Any]:
        """The derived architecture: a boolean mask for every key."""
        result: dict[str, Tensor] = {}
        strength: dict[str, float] = {}
        for key, choice in self.choices_by_key.items():
            if isinstance(choice, LayerChoice):
                result[key], strength[key] = _strongest(choice, self.probabilities(key).cpu())
        listed: set[str] = set()
        kept: set[str] = set()
        for key, choice in self.choices_by_key.items():
            if isinstance(choice, InputChoice):
                chosen = _strongest_inputs(choice, strength)
                result[key] = torch.tensor([index in chosen for index in range(len(choice))])
                listed.update(choice.choose_from)
                kept.update(choice.choose_from[index] for index in chosen)
        for key in (listed - kept) & set(strength):
            result[key] = torch.zeros_like(result[key])
        return {key: result[key] for key in self.choices_by_key}


def _strongest(choice: LayerChoice, probabilities: Tensor) -> tuple[Tensor, float]:
    mask = torch.zeros(len(choice), dtype=torch.bool)
    allowed = [index for index, name in enumerate(choice.names) if name.lower() not in EMPTY_NAMES]
    allowed = allowed or list(range(len(choice)))
    if not allowed:
        return mask, 0.0
    best = max(allowed, key=lambda index: float(probabilities[index]))
    mask[best] = True
    return mask, float(probabilities[best])


def _strongest_inputs(choice: InputChoice, strength: dict[str, float]) -> set[int]:
    count = len(choice) if choice.n_chosen is None else choice.n_chosen
    ranked = sorted(range(len(choice)), key=lambda index: -strength.get(choice.choose_from[index], 0.0))
    return set(ranked[:count])
