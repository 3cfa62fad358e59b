"""The second order of DARTS against the exact gradient, by double backward in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nascompile.mutables import LayerChoice
from nascompile.runtime.bilevel import unrolled_gradient
from nascompile.runtime.darts_mutator import DartsMutator


class Mixed(nn.Module):
    """A smooth mixed operation of three candidates and a head."""

    def __init__(self) -> None:
        super().__init__()
        tanh = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        soft = nn.Sequential(nn.Linear(4, 5), nn.Softplus())
        self.op = LayerChoice([tanh, soft, nn.Linear(4, 5)], key="op")
        self.head: nn.Module = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(x))


class Problem:
    """A model, a mutator and two batches in fp64."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = Mixed().double()
        self.mutator = DartsMutator(self.model).double()
        with torch.no_grad():
            for alpha in self.mutator.parameters():
                alpha.copy_(torch.randn_like(alpha))
        self.alphas = list(self.mutator.parameters())
        self.train = (torch.randn(12, 4).double(), torch.randn(12, 1).double())
        self.valid = (torch.randn(12, 4).double(), torch.randn(12, 1).double())

    def loss(self, batch: tuple[Tensor, Tensor], weights: dict[str, Tensor] | None = None) -> Tensor:
        self.mutator.reset()
        x, y = batch
        out = self.model(x) if weights is None else functional_call(self.model, weights, (x,))
        return (out - y).square().mean()

    def warm_up(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(self.train).backward()
            optimizer.step()
        for alpha in self.alphas:
            alpha.grad = None

    def finite_difference(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return unrolled_gradient(
            lambda: self.loss(self.train),
            lambda: self.loss(self.valid),
            optimizer,
            self.alphas,
            # the default is for fp32; its truncation error, of order radius^2, would hide small mistakes
            radius=1e-4,
        )

    def exact(self, step: Callable[[str, Tensor, Tensor], Tensor]) -> list[Tensor]:
        weights = dict(self.model.named_parameters())
        grads = torch.autograd.grad(self.loss(self.train), list(weights.values()), create_graph=True)
        moved = {name: step(name, w, g) for (name, w), g in zip(weights.items(), grads, strict=True)}
        return list(torch.autograd.grad(self.loss(self.valid, moved), self.alphas))


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    scale = max(float(w.abs().max()) for w in wanted)
    for f, w in zip(found, wanted, strict=True):
        assert float((f - w).abs().max()) <= 1e-6 * scale


SGD_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("case", SGD_CASES)
def test_agrees_with_exact_gradient(case: str, steps: int) -> None:
    problem = Problem()
    options = SGD_CASES[case]
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3, **options)
    problem.warm_up(optimizer, steps)
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    buffers = {
        name: optimizer.state[p].get("momentum_buffer") for name, p in problem.model.named_parameters()
    }

    def step(name: str, w: Tensor, g: Tensor) -> Tensor:
        d = g + options.get("weight_decay", 0.0) * w
        if momentum:
            v = d if buffers[name] is None else momentum * buffers[name] + (1 - dampening) * d
            d = d + momentum * v if options.get("nesterov") else v
        return w - 0.3 * d

    wanted = problem.exact(step)
    assert_close(problem.finite_difference(optimizer), wanted)
    # the implicit term is there, and is not small
    problem.mutator.reset()
    direct = problem.exact(lambda name, w, g: step(name, w, g).detach())
    assert float((wanted[0] - direct[0]).norm()) > 1e-2 * float(wanted[0].norm())


def test_default_radius_only_adds_truncation_error() -> None:
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)
    found = unrolled_gradient(
        lambda: problem.loss(problem.train), lambda: problem.loss(problem.valid), optimizer, problem.alphas
    )
    wanted = problem.exact(lambda name, w, g: w - 0.3 * g)
    assert float((found[0] - wanted[0]).abs().max()) < 1e-6


def test_step_of_the_reference_is_the_optimizers_own() -> None:
    """The exact oracle above moves the weights as torch's SGD does, so the two cannot be wrong together."""
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    problem.warm_up(optimizer, 3)
    seen: list[list[Tensor]] = []

    def valid_loss() -> Tensor:
        seen.append([p.detach().clone() for p in problem.model.parameters()])
        return problem.loss(problem.valid)

    unrolled_gradient(lambda: problem.loss(problem.train), valid_loss, optimizer, problem.alphas)
    problem.warm_up(optimizer, 1)
    for virtual, real in zip(seen[0], problem.model.parameters(), strict=True):
        torch.testing.assert_close(virtual, real.detach(), rtol=1e-14, atol=1e-14)


def test_groups_with_their_own_rates() -> None:
    problem = Problem()
    groups = [
        {"params": problem.model.op.parameters(), "lr": 0.5, "momentum": 0.9},
        {"params": problem.model.head.parameters(), "lr": 0.02, "weight_decay": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)

    def step(name: str, w: Tensor, g: Tensor) -> Tensor:
        return w - 0.5 * g if name.startswith("op") else w - 0.02 * (g + 0.2 * w)

    assert_close(problem.finite_difference(optimizer), problem.exact(step))


def test_other_optimizers_take_a_plain_gradient_step() -> None:
    problem = Problem()
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=0.05, weight_decay=0.1)
    problem.warm_up(optimizer, 2)
    assert_close(
        problem.finite_difference(optimizer), problem.exact(lambda name, w, g: w - 0.05 * (g + 0.1 * w))
    )


def test_weights_and_buffers_are_restored_bit_for_bit() -> None:
    problem = Problem()
    problem.model.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3, momentum=0.9)
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    unrolled_gradient(
        lambda: problem.loss(problem.train),
        lambda: problem.loss(problem.valid),
        optimizer,
        problem.alphas,
        buffers=list(problem.model.buffers()),
    )
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dropout_sees_the_same_mask_on_both_sides() -> None:
    """With fresh masks the difference of the two sides is of order 1/eps."""
    problem = Problem()
    problem.model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1)).double()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)
    torch.manual_seed(5)
    found = problem.finite_difference(optimizer)
    torch.manual_seed(5)
    assert_close(found, problem.exact(lambda name, w, g: w - 0.3 * g))
