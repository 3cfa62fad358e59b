"""Changes a model after it was compiled, and sees whether the compiled one follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.random import RandomMutator

Use = Callable[[Any, Tensor], Tensor]
"""What the model's forward does with the output of its choice: its method `use`."""
Change = Callable[[Any, pytest.MonkeyPatch], object]


def compiled(base: type[nn.Module], use: Use) -> tuple[Any, Any, Tensor]:
    """A model, its compiled form, and images for it."""
    torch.manual_seed(0)
    model = type("Model", (base,), {"use": use, "__module__": base.__module__})()
    RandomMutator(model).reset()
    return model, nascompile.compile(model), torch.randn(2, 4, 8, 8)


def assert_seen(base: type[nn.Module], use: Use, change: Change, patch: pytest.MonkeyPatch) -> None:
    """The change makes a difference, and one more trace."""
    model, network, x = compiled(base, use)
    before = network(x)
    network(x)
    change(model, patch)
    torch.testing.assert_close(network(x), model(x))
    assert not torch.allclose(before, model(x))
    assert not network.islands
    assert len(network.entries) == 2
