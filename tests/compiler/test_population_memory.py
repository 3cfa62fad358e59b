"""What a population holds in memory, and what is changed in it in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler import sharing
from nascompile.compiler.population import Population
from nascompile.mutables import LayerChoice
from tests.compiler.populations import Architecture, Chain, assert_exact, drawn, together


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain().eval()
    architectures: list[Architecture] = [
        {"a": a, "b": b, "c": c} for c in range(3) for b in range(3) for a in range(3)
    ]
    x = torch.randn(64, 4)
    peaks: list[int] = []
    original: Any = sharing.Batch._keep

    def keep(self: Any, *args: Any) -> None:
        original(self, *args)
        assert self.kept_bytes == sum(sharing._size(held) for held in self.kept.values())
        peaks.append(self.kept_bytes)

    monkeypatch.setattr(sharing.Batch, "_keep", keep)
    one = 64 * 4 * 4
    assert_exact(model, architectures, x)
    # the input, and one value of each of two choices and the addition: the depth of the trie, not its width
    assert 2 * one <= max(peaks) <= 4 * one
    for limit in (2 * one, one, 0):
        peaks.clear()
        assert_exact(model, architectures, x, memory=limit)
        assert max(peaks) <= limit


def test_nothing_lives_after_the_last_architecture() -> None:
    model = Chain().eval()
    population = Population(model, drawn(model, 6))
    with torch.no_grad():
        together(population, torch.randn(2, 4))
        (plan,) = population._plans.values()
        batch = sharing.Batch(plan.schedule, ((torch.randn(2, 4),), {}), None)
        for turn, (_, output) in enumerate(plan.schedule.order):
            batch.take(turn, output)
    assert batch.kept == {}
    assert batch.kept_bytes == 0


# ----- in-place operations


class InPlace(nn.Module):
    """Candidates that change their input, which `seen` says is read later."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.op = LayerChoice(
            [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), nn.Linear(4, 4)], key="op"
        )
        self.other = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="other")
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.other(self.op(x))
        return y + x if self.seen else y


@pytest.mark.parametrize("seen", [False, True])
def test_candidates_that_change_their_input(seen: bool) -> None:
    architectures: list[Architecture] = [{"op": i, "other": j} for i in (0, 1) for j in (0, 1)]
    assert_exact(InPlace(seen), architectures, torch.randn(3, 4), apart=2 if seen else 0)


class Writes(nn.Module):
    """Writes into parts, and in-place functions, of values that are read later."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.op = LayerChoice([nn.Linear(4, 4), nn.Tanh()], key="op")
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(3, 4)
        y = self.op(x)
        part = out[:, :2]
        if self.view:
            part.add_(1)
        out[:, 2:] = y[:, 2:]
        out.relu_()
        x.mul_(2)
        return out + x


@pytest.mark.parametrize("view", [False, True])
def test_in_place_operations(view: bool) -> None:
    architectures: list[Architecture] = [{"op": 0}, {"op": 1}]
    assert_exact(Writes(view), architectures, torch.randn(3, 4), apart=2 if view else 0)
