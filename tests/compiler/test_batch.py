"""Candidates of two layers with an activation between become two wide layers: when, when not, and that
nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.compiler.lower import LoweredLayerChoice
from nascompile.compiler.passes.fuse_weighted_sums import fuse_weighted_sums
from nascompile.compiler.passes.lower_choices import lower_choices
from nascompile.compiler.patterns import GROUPS
from tests.comparing import EXACT, assert_close
from tests.compiler.graphs import traced
from tests.compiler.grouping import OneChoice, assert_equal, compiled, found, random, steps

BATCH = next(pattern for pattern in GROUPS if pattern.name == "batch")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mlp(hidden: int = 4, act: nn.Module | None = None, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, hidden, **options), act or nn.GELU(), nn.Linear(hidden, 6, **options))


def bottleneck(hidden: int, size: int = 1, **options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, hidden, size, padding=size // 2, **options), nn.ReLU(), nn.Conv2d(hidden, 4, 1)
    )


def tokens(*, batch: int = 2) -> Tensor:
    return random(batch, 5, 6)


def image() -> Tensor:
    return random(2, 4, 7, 8)


class Named(nn.Linear):
    """A subclass that may have more to it."""


class Functional(nn.Module):
    """The same two layers in the words of a forward."""

    def __init__(self, hidden: int, slope: float = 0.1) -> None:
        super().__init__()
        self.up, self.down, self.slope = nn.Linear(6, hidden), nn.Linear(hidden, 6), slope

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), self.slope))


FIRES: dict[str, tuple[Any, Any, list[int]]] = {
    "equal": (lambda: [mlp(), mlp(), mlp()], tokens, [0, 1, 2]),
    "widths": (lambda: [mlp(2), mlp(3), mlp(9)], tokens, [0, 1, 2]),
    "some biases": (lambda: [mlp(), mlp(bias=False)], tokens, [0, 1]),
    "no bias": (lambda: [mlp(bias=False), mlp(bias=False)], tokens, [0, 1]),
    "activations": (
        lambda: [mlp(act=nn.GELU()), mlp(3, act=nn.ReLU(inplace=True)), mlp()],
        tokens,
        [0, 1, 2],
    ),
    "functional": (lambda: [Functional(3), Functional(4), Functional(5, 0.3)], tokens, [0, 1, 2]),
    "some": (lambda: [mlp(), nn.Linear(6, 6), mlp(), nn.Identity()], tokens, [0, 2]),
    "dropout that does nothing": (
        lambda: [nn.Sequential(*mlp(), nn.Dropout(0.0)) for _ in range(2)],
        tokens,
        [0, 1],
    ),
    "bottlenecks": (lambda: [bottleneck(2), bottleneck(3), nn.MaxPool2d(3, 1, 1)], image, [0, 1]),
    "convolutions": (lambda: [bottleneck(2, 3), bottleneck(4, 3, bias=False)], image, [0, 1]),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", FIRES)
def test_fires_and_keeps_everything(name: str, reduction: str) -> None:
    candidates, x, batched = FIRES[name]
    eager, model = compiled(candidates(), x(), reduction=reduction)
    assert ("batch", batched) in found(model)
    count = len(eager.op)  # type: ignore[arg-type]
    assert_equal(eager, model, x(), [0.1 + 0.2 * k for k in range(count)])
    assert_equal(eager, model, x(), [*[0.4] * (count - 1), 0.0])


@pytest.mark.parametrize("name", FIRES)
def test_before_and_after_are_the_same_function(name: str) -> None:
    candidates, x, _ = FIRES[name]
    _, model = compiled(candidates(), x())
    group = next(g for g in model.entries[0].lowered[0].groups if g.pattern is BATCH)
    weights = torch.linspace(0.2, 0.9, len(group.members), dtype=torch.float64)
    after, before = (one(x(), group.members, weights) for one in (BATCH.after, BATCH.before))
    assert_close(after, before, rtol=1e-12, atol=1e-12)


DECLINES: dict[str, tuple[Any, Any, str]] = {
    "wide": (lambda: [mlp(24), mlp(24)], tokens, ""),
    "geometries differ": (lambda: [bottleneck(2), bottleneck(2, 3)], image, ""),
    "grouped": (lambda: [bottleneck(4, 3, groups=4), bottleneck(4, 3, groups=4)], image, ""),
    "dropout": (
        lambda: [nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 6)), mlp()],
        tokens,
        "",
    ),
    "three layers": (
        lambda: [nn.Sequential(*mlp(), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)],
        tokens,
        "",
    ),
    "softmax between": (lambda: [mlp(act=nn.Softmax(-1)), mlp(act=nn.Softmax(-1))], tokens, ""),
    "a single one": (lambda: [mlp(), nn.Identity()], tokens, ""),
    "a subclass": (
        lambda: [mlp(), nn.Sequential(Named(6, 3), nn.ReLU(), nn.Linear(3, 6))],
        tokens,
        "is a subclass of Linear",
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_does_not_fire(name: str) -> None:
    candidates, x, note = DECLINES[name]
    _, model = compiled(candidates(), x())
    assert found(model) == []
    assert note in model.notes.get("op", "")
    assert bool(note) == ("merged" in model.notes.get("op", ""))


def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("path", ["op.0", "op.1.1"])
def test_hooks_run(path: str) -> None:
    eager, model = compiled([mlp(), mlp()], tokens())
    assert_equal(eager, model, tokens(), [0.5, 0.5])
    for one in (eager, model):
        one.get_submodule(path).register_forward_hook(hook)
    assert_equal(eager, model, tokens(), [0.5, 0.5])
    assert found(model) == []


def test_a_second_run_changes_nothing_and_without_the_pattern_nothing_happens() -> None:
    gm = traced(OneChoice([mlp(), mlp()]))
    lower_choices(gm)
    assert fuse_weighted_sums(gm) == 1
    (target,) = [n.target for n in gm.graph.nodes if isinstance(n.target, LoweredLayerChoice)]
    groups = target.groups
    assert fuse_weighted_sums(gm) == 0
    assert target.groups is groups
    assert len(groups) == 1


def test_two_products_run(monkeypatch: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    original = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return original(x, weight, bias)

    _, model = compiled([mlp(3), mlp(4), mlp(5)], tokens())
    monkeypatch.setattr(F, "linear", counted)
    steps(model, model, tokens(), [0.2, 0.3, 0.5])
    assert shapes[:2] == [(12, 6), (6, 12)]
    shapes.clear()
    steps(model, model, tokens(), [0.2, 0.0, 0.5])
    assert shapes[:2] == [(8, 6), (6, 8)]


def test_hard_zeros_are_not_computed_and_one_candidate_is_exactly_itself() -> None:
    eager, model = compiled([mlp(), mlp(), mlp()], tokens())
    step = assert_equal(eager, model, tokens(), [0.5, 0.0, 0.5])
    assert step["weights"]["op.1.0.weight"] is None
    assert step["decisions"]["op"][1] == 0
    for weights in ([0.0, 0.7, 0.0], [False, True, False], [True, False, True]):
        expected, actual = steps(eager, model, tokens(), weights)
        assert_close(actual, expected, **EXACT)


def test_batch_norm_and_dropout_in_evaluation() -> None:
    def candidate() -> nn.Module:
        up, down = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.Conv2d(3, 4, 1)
        return nn.Sequential(up, nn.BatchNorm2d(3), nn.ReLU6(), nn.Dropout(), down, nn.BatchNorm2d(4))

    eager, model = compiled([candidate(), candidate()], image())
    for mode in (True, False, True, False):
        eager.train(mode)
        model.train(mode)
        if not mode:
            assert_equal(eager, model, image(), [0.3, 0.7])
            assert found(model) == [("batch", [0, 1])]
        else:
            steps(eager, model, image(), [0.3, 0.7])
        assert len(model.entries) <= 2


def test_the_last_batch_may_be_smaller() -> None:
    eager, model = compiled([mlp(), mlp(3)], tokens())
    for batch in (3, 1, 0):
        assert_equal(eager, model, tokens(batch=batch), [0.6, 0.4])
    assert_equal(eager, model, random(6), [0.6, 0.4])


def test_an_optimizer_moves_the_very_same_parameters() -> None:
    eager, model = compiled([mlp(), mlp(3)], tokens())
    assert list(model.state_dict()) == list(eager.state_dict())
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, momentum=0.9) for one in (eager, model)]
    for _ in range(3):
        assert_equal(eager, model, tokens(), [0.6, 0.4], rtol=1e-11, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(dict(model.state_dict()), dict(eager.state_dict()), rtol=1e-11, atol=1e-11)


def test_a_changed_activation_is_followed() -> None:
    eager, model = compiled([mlp(act=nn.LeakyReLU(0.1)), mlp(act=nn.LeakyReLU(0.1))], tokens())
    assert_equal(eager, model, tokens(), [0.6, 0.4])
    for one in (eager, model):
        one.get_submodule("op.1.1").negative_slope = 0.7  # type: ignore[assignment]
    assert_equal(eager, model, tokens(), [0.6, 0.4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    x = tokens().detach().to(dtype)
    eager, model = compiled([mlp(), mlp(3)], x)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        expected, actual = steps(eager, model, x, [0.4, 0.6])
    assert found(model) == [("batch", [0, 1])]
    assert actual["outputs"].dtype == expected["outputs"].dtype == torch.bfloat16
    exact, _ = steps(eager.double(), eager, x.double(), [0.4, 0.6])
    torch.testing.assert_close(actual["outputs"].double(), exact["outputs"], rtol=0.02, atol=0.02)
    assert actual["weights"]["op.0.0.weight"].dtype == dtype
