"""BatchNorms of their own that have one set of running statistics: updated in the order of the program."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.darts import DartsMutator
from nascompile.mutables import LayerChoice

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _conv() -> nn.Module:
    return nn.Conv2d(8, 8, 1, bias=False)


class Net(nn.Module):
    """The first choice's BatchNorm is behind two convolutions, the second's behind one."""

    def __init__(self) -> None:
        super().__init__()
        deep = nn.Sequential(_conv(), nn.BatchNorm2d(8), nn.ReLU(), _conv(), nn.BatchNorm2d(8))
        self.a = LayerChoice([deep, nn.Identity()], key="a")
        self.b = LayerChoice([nn.Sequential(_conv(), nn.BatchNorm2d(8)), nn.Identity()], key="b")
        self.norms = (deep[4], self.b[0][1])

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)

    def tie(self) -> None:
        first, second = self.norms
        for name in STATISTICS:
            setattr(second, name, getattr(first, name))

    def untie(self) -> None:
        for name in STATISTICS:
            setattr(self.norms[1], name, getattr(self.norms[1], name).clone())


@pytest.mark.parametrize("when", ["before", "later", "undone"])
def test_they_are_updated_in_the_order_of_the_program(when: str) -> None:
    torch.manual_seed(0)
    model = Net()
    if when != "later":
        model.tie()
    other = copy.deepcopy(model)
    compiled = nascompile.compile(model)
    seen = []
    for one, call in ((model, compiled), (other, other)):
        DartsMutator(one).reset()
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            if step == 2:
                {"before": lambda: None, "later": one.tie, "undone": one.untie}[when]()
            call(1 + torch.randn(2, 8, 6, 6, generator=generator))
        seen.append({name: buffer.clone() for name, buffer in one.named_buffers()})
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)
    # a plan has them again as soon as they are apart
    assert bool(compiled.notes) == (when != "undone")
