"""The bias of a merged convolution: its gradient keeps its digits, and it may be transformed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests import numerics
from tests.comparing import Decided
from tests.compiler.grouping import compiled, steps


def same(size: int) -> nn.Module:
    return nn.Conv2d(4, 4, size, padding=size // 2)


def test_the_gradient_of_the_bias_keeps_its_digits() -> None:
    x = torch.randn(32, 4, 64, 64)
    eager, model = compiled([same(3), same(5)], x)
    exact, _ = steps(eager.double(), eager, x.double(), [0.4, 0.6])
    _, actual = steps(model, model, x, [0.4, 0.6])
    for name in ("op.0.bias", "op.1.bias"):
        numerics.assert_close(actual["weights"][name], exact["weights"][name], name=name)
    numerics.assert_close(actual["decisions"]["op"].float(), exact["decisions"]["op"], name="decision")


def test_functions_over_a_batch_of_biases() -> None:
    x = torch.randn(2, 4, 6, 6)
    eager, model = compiled([same(3), same(5)], x)
    biases = torch.randn(3, 4)
    found = []
    for one in (eager, model):
        Decided(one).decide({"op": torch.tensor([0.4, 0.6])})

        def outputs(bias: Tensor, one: nn.Module = one) -> Tensor:
            return torch.func.functional_call(one, {"op.0.bias": bias}, (x,))

        found.append(torch.func.vmap(outputs)(biases))
    numerics.assert_close(found[1], found[0])
