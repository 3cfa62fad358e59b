"""Tensors of other shapes than their modules say: torch's own results and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.darts import DartsMutator
from nascompile.mutables import LayerChoice

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv: Any = nn.Conv2d(3, 8, 3, padding=1)
        self.norm: Any = nn.BatchNorm2d(8)
        self.each: Any = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.choice = LayerChoice([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)], key="choice")

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(self.each(self.norm(self.conv(x)))).mean((2, 3))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.1))


CHANGES: dict[str, Callable[[Net], object]] = {
    "fewer outputs": lambda net: setattr(net.conv, "weight", weight(4, 3, 3, 3)),
    "more outputs": lambda net: setattr(net.conv, "weight", weight(16, 3, 3, 3)),
    "other inputs": lambda net: setattr(net.conv, "weight", weight(8, 4, 3, 3)),
    "larger kernel": lambda net: setattr(net.conv, "weight", weight(8, 3, 5, 5)),
    "smaller kernel": lambda net: setattr(net.conv, "weight", weight(8, 3, 1, 1)),
    "as many taps": lambda net: setattr(net.conv, "weight", weight(8, 3, 1, 9)),
    "no kernel": lambda net: setattr(net.each, "weight", weight(8, 1)),
    "fewer groups": lambda net: setattr(net.each, "weight", weight(4, 1, 3, 3)),
    "bias": lambda net: setattr(net.conv, "bias", weight(4)),
    "bias of two dimensions": lambda net: setattr(net.conv, "bias", weight(8, 1)),
    "gamma": lambda net: setattr(net.norm, "weight", weight(4)),
    "larger gamma": lambda net: setattr(net.norm, "weight", weight(16)),
    "beta": lambda net: setattr(net.norm, "bias", weight(4)),
    "no gamma left": lambda net: setattr(net.norm, "weight", weight(0)),
    "mean": lambda net: setattr(net.norm, "running_mean", torch.zeros(4)),
    "variance": lambda net: setattr(net.norm, "running_var", torch.ones(4)),
    "counter": lambda net: setattr(net.norm, "num_batches_tracked", torch.tensor(3, dtype=torch.int32)),
    "memory": lambda net: net.conv.weight.untyped_storage().resize_(0),
    "memory of gamma": lambda net: net.norm.weight.untyped_storage().resize_(0),
    "memory of the mean": lambda net: net.norm.running_mean.untyped_storage().resize_(0),
}


def outcome(net: Net, mutator: DartsMutator, run: Callable[..., Tensor]) -> Tensor | None:
    """The output, and None where the change is an error."""
    mutator.reset()
    try:
        out = run(X)
        out.sin().sum().backward()
    except RuntimeError:
        return None
    return out.detach()


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_other_shapes(change: str, is_warm: bool) -> None:
    torch.manual_seed(0)
    net = Net()
    other = copy.deepcopy(net)
    (mutator, twin), compiled = (DartsMutator(net), DartsMutator(other)), nascompile.compile(net)
    with torch.no_grad():
        twin.choices["choice"].copy_(mutator.choices["choice"])
    for _ in range(3 * is_warm):
        outcome(net, mutator, compiled), outcome(other, twin, other)
    CHANGES[change](net), CHANGES[change](other)
    found, expected = outcome(net, mutator, compiled), outcome(other, twin, other)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        torch.testing.assert_close(found, expected)


def test_weights_that_shrink_before_backward_are_an_error() -> None:
    net = Net()
    mutator, compiled = DartsMutator(net), nascompile.compile(net)
    for data in (torch.zeros(8, 1, 1, 1), torch.empty(0)):
        mutator.reset()
        loss = compiled(X).sin().sum()
        kept, net.each.weight.data = net.each.weight.data, data
        with pytest.raises(RuntimeError):
            loss.backward()
        net.each.weight.data = kept
