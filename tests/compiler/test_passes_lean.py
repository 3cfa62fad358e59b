"""What the passes of lean networks owe; see test_passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from nascompile.compiler.passes.drop_dead import drop_dead
from nascompile.compiler.passes.drop_zero_terms import LayoutRecorder, drop_zero_terms
from tests.compiler.graphs import assert_pass_keeps_results, targets, traced
from tests.compiler.test_passes import Opaque, of, rows

# ----- drop_dead


def dead(self: Any, x: Tensor) -> Tensor:
    self.linear(x)
    y = x * 2
    y.add_(1)
    z = torch.zeros(4)
    z[0] = 5
    return x + 1


def test_drop_dead() -> None:
    gm = assert_pass_keeps_results(of(dead), drop_dead, rows())
    assert targets(gm) == ["add"]
    assert drop_dead(gm) == 0


def alive(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    y[0].mul_(3)
    y.view(-1)[1:3] += 1
    self.identity.scale.add_(1)
    return y


def dead_with_an_island(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    self.identity(y)
    return y


def out_argument(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    torch.mul(x, 2, out=y)
    return y


@pytest.mark.parametrize("program", [dead_with_an_island, out_argument])
def test_drop_dead_keeps_what_may_change_a_value(program: Any) -> None:
    assert drop_dead(traced(of(program, identity=Opaque()))) == 0


def test_drop_dead_keeps_changes_in_place_that_matter() -> None:
    model: Any = of(alive)
    model.identity.register_buffer("scale", torch.zeros(()))
    gm = traced(model)
    assert drop_dead(gm) == 0
    assert_pass_keeps_results(model, drop_dead, rows())


# ----- drop_zero_terms


def recorded(program: Any) -> fx.GraphModule:
    gm = traced(of(program))
    LayoutRecorder(gm).run(rows().detach())
    return gm


def zero_terms(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    return torch.zeros_like(y) + y + x * 0 + F.relu(x.new_zeros(2, 4))


def test_drop_zero_terms() -> None:
    gm = recorded(zero_terms)
    assert drop_zero_terms(gm) == 3
    assert drop_zero_terms(gm) == 0
    model = of(zero_terms)

    def both(gm: fx.GraphModule) -> None:
        LayoutRecorder(gm).run(rows().detach())
        drop_zero_terms(gm)
        drop_dead(gm)

    gm = assert_pass_keeps_results(model, both, rows())
    assert targets(gm) == ["linear"]


def broadcast(self: Any, x: Tensor) -> Tensor:
    return self.linear(x)[0] + torch.zeros_like(x)


def filled(self: Any, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z[:, 0] = 1
    return self.linear(x) + z


def filled_through_a_view(self: Any, x: Tensor) -> Tensor:
    z = x * 0
    row = z[0]
    row.add_(1)
    return self.linear(x) + z


def sum_changed(self: Any, x: Tensor) -> Any:
    y = self.linear(x)
    z = y + x * 0
    z.mul_(2)
    return y, z


def term_changed(self: Any, x: Tensor) -> Any:
    y = self.linear(x)
    z = y + x * 0
    y.mul_(2)
    return y, z


@pytest.mark.parametrize("program", [broadcast, filled, filled_through_a_view, sum_changed, term_changed])
def test_drop_zero_terms_keeps_what_is_not_only_zero(program: Any) -> None:
    assert drop_zero_terms(recorded(program)) == 0


def test_drop_zero_terms_needs_shapes() -> None:
    assert drop_zero_terms(traced(of(zero_terms))) == 0
