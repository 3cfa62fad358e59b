"""What a backward pass leaves out when only some gradients are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.region.profiling import profiling
from nascompile.darts import DartsMutator
from nascompile.kernels import native
from nascompile.kernels.plan.steps import ConvolveBackward
from nascompile.mutables import LayerChoice
from tests.comparing import assert_close

pytestmark = pytest.mark.skipif(native.load()[1] is not None, reason="needs the C++ extension")
X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def unit(inputs: int, kernel: int) -> nn.Module:
    conv = nn.Conv2d(inputs, 8, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())


class Net(nn.Module):
    """A stem, and two choices of two convolutions one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 3)
        self.first = LayerChoice([unit(8, 1), unit(8, 3)], key="first")
        self.second = LayerChoice([unit(8, 1), unit(8, 3)], key="second")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


def gradients(*, of_weights: bool) -> tuple[list[Tensor], int]:
    """Those asked for, and how many convolutions the backward pass ran."""
    torch.manual_seed(1)
    model = Net()
    mutator = DartsMutator(model)
    compiled = nascompile.compile(model)
    wanted = [*mutator.parameters(), *(model.parameters() if of_weights else ())]
    mutator.reset()
    loss = compiled(X).sin().sum()
    with profiling() as profile:
        found = torch.autograd.grad(loss, wanted)
    (run,) = profile.runs
    return list(found), sum(isinstance(part.operation, ConvolveBackward) for part, _ in run.parts())


def test_what_leads_to_weights_only_does_not_run() -> None:
    full, all_of_them = gradients(of_weights=True)
    few, some = gradients(of_weights=False)
    # the stem's and those of both choices; only through those of the second one the first is reached
    assert (all_of_them, some) == (5, 2)
    for one, other in zip(few, full, strict=False):
        assert_close(one, other)
