"""A whole search finds the same with the compiled supernet as with the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nascompile.darts import DartsTrainer
from nascompile.spaces import DartsNetwork

EPOCHS = 3
CLOSE = 1e-2
"""Of probabilities after a search: Adam steps by the sign where a gradient is near zero."""


def digits(first: int, count: int) -> TensorDataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[first : first + count], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return TensorDataset(images, torch.tensor(labels[first : first + count]))


def search(*, compile: bool, unrolled: bool) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    torch.manual_seed(0)
    model = DartsNetwork(8, 1, 8, 10, 3, n_nodes=2)
    trainer = DartsTrainer(
        model,
        nn.CrossEntropyLoss(),
        None,
        torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        EPOCHS,
        digits(0, 96),
        digits(96, 96),
        batch_size=32,
        workers=0,
        device="cpu",
        arc_learning_rate=0.03,
        unrolled=unrolled,
        compile=compile,
        seed=0,
    )
    trainer.train()
    compiled: Any = trainer.compiled
    entries = [] if compiled is None else compiled.entries
    plans = [region.__name__ for entry in entries for region in entry.regions if region.plans]
    mutator = trainer.mutator
    probabilities = {key: mutator.probabilities(key).detach() for key in mutator.choices}
    return [epoch["train_loss"] for epoch in trainer.history], probabilities, plans


@pytest.mark.parametrize("unrolled", [False, True])
def test_losses_and_probabilities_are_those_of_the_eager_search(unrolled: bool) -> None:
    expected, eager, _ = search(compile=False, unrolled=unrolled)
    losses, found, plans = search(compile=True, unrolled=unrolled)
    assert plans, "nothing was planned"
    assert len(losses) == EPOCHS
    # rounding grows with the steps: 1e-7 in the first epoch, 2e-4 in the third
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=0.0)
    for key, probabilities in eager.items():
        torch.testing.assert_close(found[key], probabilities, rtol=0.0, atol=CLOSE)
