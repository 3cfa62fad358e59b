"""Every space, pruned: exactly the parameters that the decision uses, and the supernet's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nascompile
from nascompile.mutator import Mutator
from tests.spaces.eager import RandomDecisions, used_parameters
from tests.spaces.test_every_space import SPACES


class Fixed(Mutator):
    """Exports the masks it is given."""

    def sample_final(self) -> dict[str, Any]:
        return self.decision


@pytest.mark.parametrize("name", SPACES)
def test_pruned_space_is_lean_and_equal(name: str) -> None:
    model = SPACES[name]()
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        reader = RandomDecisions(model)
        masks = reader.sample_search()
        reader.release()
        mutator = Fixed(model)
        mutator.decide(masks)
        model.train()
        used = used_parameters(model, x)
        model.eval()
        expected = model(x)
        architecture = mutator.export()
        mutator.release()
        lean = nascompile.prune(model, architecture, x).eval()
        assert sum(p.numel() for p in lean.parameters()) == used
        assert torch.equal(lean(x), expected)
