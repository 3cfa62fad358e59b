"""Affine candidates become one layer: when, when not, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nascompile.compiler.chains import Member
from nascompile.compiler.lower import LoweredLayerChoice
from nascompile.compiler.merging import common_grid, pick
from nascompile.compiler.passes.fuse_weighted_sums import fuse_weighted_sums
from nascompile.compiler.passes.lower_choices import lower_choices
from nascompile.compiler.patterns import GROUPS
from tests.comparing import EXACT, Decided, assert_close
from tests.compiler.graphs import traced
from tests.compiler.grouping import OneChoice, assert_equal, compiled, found, random, steps

MERGE = next(pattern for pattern in GROUPS if pattern.name == "merge")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def conv(size: Any, channels: int = 4, **options: Any) -> nn.Module:
    return nn.Conv2d(channels, channels, size, **options)


def same(size: int, **options: Any) -> nn.Module:
    return conv(size, padding=size // 2, **options)


def image(*, batch: int = 2) -> Tensor:
    return random(batch, 4, 9, 8)


class Wrapped(nn.Module):
    """Only calls its layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Named(nn.Conv2d):
    """A subclass that may have more to it."""


class Doubled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def relu_conv() -> nn.Module:
    return nn.Sequential(nn.ReLU(), same(3), nn.Tanh())


FIRES: dict[str, tuple[Any, Any, list[int]]] = {
    "sizes": (lambda: [same(k) for k in (3, 5, 7, 1)], image, [0, 1, 2, 3]),
    "no bias": (lambda: [same(3, bias=False), same(5, bias=False)], image, [0, 1]),
    "some biases": (lambda: [same(3), same(5, bias=False), same(3)], image, [0, 1, 2]),
    "even sizes": (lambda: [conv(2, padding=1), conv(4, padding=2)], image, [0, 1]),
    "valid": (lambda: [conv(2), conv(4, padding=1), conv(2, padding="valid")], image, [0, 1, 2]),
    "strides": (lambda: [same(3, stride=2), same(5, stride=2), same(1, stride=2)], image, [0, 1, 2]),
    "dilated": (lambda: [conv(3, padding=2, dilation=2), same(5), same(1)], image, [0, 1, 2]),
    "all dilated": (lambda: [conv(k, padding=k - 1, dilation=2) for k in (3, 5)], image, [0, 1]),
    "rectangles": (lambda: [conv((1, 3), padding=(0, 1)), same(3)], image, [0, 1]),
    "same padding": (
        lambda: [conv(3, padding="same"), conv(3, padding="same", dilation=2), same(5)],
        image,
        [0, 1, 2],
    ),
    "depthwise": (lambda: [same(3, groups=4), same(5, groups=4), nn.Identity()], image, [0, 1, 2]),
    "two groups": (lambda: [same(3, groups=2), nn.Identity(), same(5, groups=2)], image, [0, 1, 2]),
    "identity": (lambda: [same(3), nn.Identity()], image, [0, 1]),
    "wrapped": (
        lambda: [nn.Sequential(same(3)), Wrapped(Wrapped(same(5))), nn.Sequential()],
        image,
        [0, 1, 2],
    ),
    "some": (lambda: [same(3), nn.MaxPool2d(3, 1, 1), same(5), relu_conv()], image, [0, 2]),
    "behind a shared ReLU": (
        lambda: [nn.Sequential(nn.ReLU(), same(3)), same(5), nn.Sequential(nn.ReLU(), same(5))],
        image,
        [0, 2],
    ),
    "linear": (
        lambda: [nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Identity()],
        lambda: random(2, 5, 6),
        [0, 1, 2],
    ),
    "one dimension": (
        lambda: [nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(4, 6, 5, padding=2)],
        lambda: random(2, 4, 9),
        [0, 1],
    ),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", FIRES)
def test_fires_and_keeps_everything(name: str, reduction: str) -> None:
    candidates, x, merged = FIRES[name]
    eager, model = compiled(candidates(), x(), reduction=reduction)
    assert found(model) == [("merge", merged)]
    assert not model.notes
    count = len(eager.op)  # type: ignore[arg-type]
    assert_equal(eager, model, x(), [0.1 + 0.2 * k for k in range(count)])
    # the last candidate takes no part
    assert_equal(eager, model, x(), [*[0.4] * (count - 1), 0.0])


@pytest.mark.parametrize("name", FIRES)
def test_before_and_after_are_the_same_function(name: str) -> None:
    candidates, x, _ = FIRES[name]
    _, model = compiled(candidates(), x())
    (group,) = model.entries[0].lowered[0].groups
    members: tuple[Member, ...] = tuple(m for m in group.members if m.source is None)
    weights = torch.linspace(0.2, 0.9, len(members), dtype=torch.float64)
    if len(members) > 1:
        assert_close(
            MERGE.after(x(), members, weights), MERGE.before(x(), members, weights), rtol=1e-12, atol=1e-12
        )


DECLINES: dict[str, tuple[Any, str]] = {
    "strides differ": (lambda: [same(3, stride=2), conv(1, padding=0)], ""),
    "channels differ": (lambda: [same(3), nn.Conv2d(4, 8, 3, padding=1)], ""),
    "groups differ": (lambda: [same(3), same(3, groups=2)], ""),
    "outputs differ in size": (lambda: [same(3), conv(3)], ""),
    "reflected padding": (lambda: [same(3, padding_mode="reflect"), same(5)], 'padding mode "reflect"'),
    "one side padded more": (
        lambda: [conv(2, padding="same"), conv(4, padding="same")],
        "pads one side more",
    ),
    "more taps together": (lambda: [conv((1, 7), padding=(0, 3)), conv((7, 1), padding=(3, 0))], ""),
    "activation behind": (lambda: [nn.Sequential(same(k), nn.ReLU()) for k in (3, 5)], ""),
    "statistics of the batch": (lambda: [nn.Sequential(same(k), nn.BatchNorm2d(4)) for k in (3, 5)], ""),
    "a subclass": (lambda: [Named(4, 4, 3, padding=1), same(5)], "'0' is a subclass of Conv2d"),
    "an own forward": (lambda: [Doubled(4, 4, 3, padding=1), same(5)], ""),
    "parametrized": (lambda: [parametrizations.weight_norm(same(3)), same(5)], "'0' has parametrizations"),
    "a single layer": (lambda: [same(3), relu_conv()], ""),
    "in place": (
        lambda: [nn.Sequential(nn.ReLU(inplace=True), same(3)), same(3), same(5)],
        "'0' changes its input",
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_does_not_fire(name: str) -> None:
    candidates, note = DECLINES[name]
    _, model = compiled(candidates(), image())
    assert found(model) == []
    assert note in model.notes.get("op", "")
    assert bool(note) == ("merged" in model.notes.get("op", ""))


def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("path", ["op.0", "op.0.0", "op.2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run(path: str, when: str) -> None:
    eager: Any = OneChoice([nn.Sequential(same(3)), same(5), nn.MaxPool2d(3, 1, 1)]).double()
    if when == "before":
        eager.get_submodule(path).register_forward_hook(hook)
    eager, model = compiled(list(eager.op), image())
    if when == "after":
        assert found(model) == [("merge", [0, 1])]
        for one in (eager, model):
            one.get_submodule(path).register_forward_hook(hook)
    assert_equal(eager, model, image(), [0.5, 0.3, 0.2])
    assert found(model) == []


def test_hooks_on_all_modules_are_not_passed_by() -> None:
    _, model = compiled([same(3), same(5)], image())
    (group,) = model.entries[0].lowered[0].groups
    assert group.why_not_now(image(), group.members) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert group.why_not_now(image(), group.members) == "hooks on all modules are active"
    finally:
        handle.remove()


def test_a_second_run_changes_nothing_and_without_the_pattern_nothing_happens() -> None:
    gm = traced(OneChoice([same(3), same(5)]))
    lower_choices(gm)
    assert fuse_weighted_sums(gm) == 1
    groups = [node.target.groups for node in gm.graph.nodes if isinstance(node.target, LoweredLayerChoice)]
    assert fuse_weighted_sums(gm) == 0
    assert groups == [n.target.groups for n in gm.graph.nodes if isinstance(n.target, LoweredLayerChoice)]
    gm = traced(OneChoice([same(3), nn.MaxPool2d(3, 1, 1)], "none"))
    lower_choices(gm)
    assert fuse_weighted_sums(gm) == 0


def test_one_convolution_runs(monkeypatch: Any) -> None:
    calls: list[tuple[int, ...]] = []
    original = torch.conv2d

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(weight.shape[2:]))
        return original(x, weight, *rest)

    eager, model = compiled([same(3), same(5), same(7), nn.MaxPool2d(3, 1, 1)], image())
    monkeypatch.setattr("nascompile.compiler.affine._FUNCTIONS", {nn.Conv2d: counted})
    assert_equal(eager, model, image(), [0.1, 0.2, 0.3, 0.4])
    assert_equal(eager, model, image(), [0.1, 0.2, 0.0, 0.4])
    assert calls == [(7, 7), (5, 5)]


# ----- decisions


def test_hard_zeros_are_not_computed_and_one_candidate_is_exactly_itself() -> None:
    eager, model = compiled([same(3), same(5), same(7)], image())
    step = assert_equal(eager, model, image(), [0.5, 0.0, 0.5])
    assert step["weights"]["op.1.weight"] is None
    assert step["weights"]["op.1.bias"] is None
    assert step["decisions"]["op"][1] == 0
    for weights in ([0.0, 0.7, 0.0], [False, True, False], [True, False, True]):
        expected, actual = steps(eager, model, image(), weights)
        assert_close(actual, expected, **EXACT)


def test_fewer_candidates_may_have_more_taps_together_than_alone() -> None:
    candidates = [same(3), conv(3, padding=3, dilation=3), conv(7, padding=3)]
    eager, model = compiled(candidates, image())
    assert found(model) == [("merge", [0, 1, 2])]
    expected, actual = steps(eager, model, image(), [0.5, 0.5, 0.0])
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (group,) = model.entries[0].lowered[0].groups
    assert group.why_not_now(image(), group.members[:2]) == "one kernel would have more taps than all"


def test_neighbours_are_picked_without_a_copy() -> None:
    weights = torch.arange(5.0)
    assert pick(weights, [1, 2, 3]).data_ptr() == weights[1:].data_ptr()
    assert pick(weights, [0, 3]).tolist() == [0, 3]


def test_grids() -> None:
    grid = common_grid((((3, 1, 1),), ((3, 3, 3),)))
    assert grid is not None
    assert (grid.size, grid.dilation, grid.padding) == ((7,), (1,), (3,))
    assert [list(range(7))[place[0]] for place in grid.places] == [[2, 3, 4], [0, 3, 6]]
    assert common_grid((((3, 1, 1),), ((3, 1, 0),))) is None


# ----- modes, types, sizes


def test_batch_norm_is_folded_in_evaluation_only() -> None:
    def candidates() -> list[nn.Module]:
        norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, eps=0.1)]
        return [
            nn.Sequential(nn.ReLU(), same(k, bias=k == 3), norm)
            for k, norm in zip((3, 1, 5), norms, strict=True)
        ]

    eager, model = compiled([*candidates(), nn.Identity()], image())
    weights = [0.1, 0.2, 0.3, 0.4]
    for _ in range(2):
        for mode, groups in ((True, []), (False, [("merge", [0, 1, 2])])):
            eager.train(mode)
            model.train(mode)
            buffers = copy.deepcopy(dict(model.named_buffers()))
            assert_equal(eager, model, image(), weights)
            entry = max(model.entries, key=lambda entry: entry.last_call)
            assert [(g.pattern.name, [m.index for m in g.members]) for g in entry.lowered[0].groups] == groups
            if not mode:
                assert_close(dict(model.named_buffers()), buffers, **EXACT)
    assert len(model.entries) == 2
    # without running statistics those of the batch are used in evaluation, too
    _, model = compiled(
        [nn.Sequential(same(k), nn.BatchNorm2d(4, track_running_stats=False)) for k in (3, 5)],
        image(),
        training=False,
    )
    assert found(model) == []


def test_the_last_batch_may_be_smaller() -> None:
    eager, model = compiled([same(3), same(5)], image())
    for batch in (3, 1, 0):
        assert_equal(eager, model, image(batch=batch), [0.6, 0.4])
    # a single image has no batch dimension
    assert_equal(eager, model, random(4, 9, 8), [0.6, 0.4])


def test_parameters_are_the_very_same_and_an_optimizer_moves_them() -> None:
    eager, model = compiled([same(3), same(5)], image())
    assert list(model.state_dict()) == list(eager.state_dict())
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, momentum=0.9) for one in (eager, model)]
    for _ in range(3):
        assert_equal(eager, model, image(), [0.6, 0.4])
        for optimizer in optimizers:
            optimizer.step()
    assert_close(dict(model.state_dict()), dict(eager.state_dict()), rtol=1e-11, atol=1e-11)


def test_settings_may_change_between_calls() -> None:
    eager, model = compiled([same(3), same(5)], image())
    changes: list[Any] = [
        lambda m: setattr(m.op[1], "padding", (1, 1)) or setattr(m.op[1], "dilation", (1, 1)),
        lambda m: setattr(m.op, "0", conv(1).double()) or setattr(m.op, "1", same(7).double()),
        lambda m: setattr(m.op[0], "weight", nn.Parameter(m.op[0].weight.detach().repeat(1, 1, 1, 1) * 2)),
        lambda m: setattr(m.op[0], "forward", lambda x: x * 3),
    ]
    for change in changes[1:]:
        torch.manual_seed(1)
        change(eager)
        torch.manual_seed(1)
        change(model)
        assert_equal(eager, model, image(), [0.6, 0.4])
    changes[0](model)
    with pytest.raises(ValueError, match="returns"):
        steps(model, model, image(), [0.6, 0.4])


def test_half_the_parameters_of_another_type_are_not_merged() -> None:
    _, model = compiled([same(3), same(5)], image())
    (group,) = model.entries[0].lowered[0].groups
    model.op[0].half()
    assert group.why_not_now(image(), group.members) == "has parameters of type torch.float16"
    model.op[0].float()
    assert group.why_not_now(image(), group.members) == "the parameters differ in type"


def test_what_a_trace_did_not_see_is_looked_at_in_every_call() -> None:
    _, model = compiled([same(3), same(5)], image())
    (group,) = model.entries[0].lowered[0].groups
    assert group.why_not_now(random(4, 9, 8), group.members) == "the input has no batch dimension"
    assert group.why_not_now(None, group.members) == "the input is no dense tensor"
    model.op[0].weight = nn.Parameter(conv(1).weight.detach().double())  # type: ignore[union-attr]
    assert group.why_not_now(image(), group.members) == "a weight has another shape"


def test_second_derivatives() -> None:
    results = []
    for one in compiled([same(3), same(5), nn.Identity()], image()):
        mask = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
        Decided(one).decide({"op": mask})
        leaves = [mask, *one.parameters()]
        first = torch.autograd.grad(one(image()).pow(2).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))  # type: ignore[arg-type]
    assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


def test_autocast_to_bfloat16() -> None:
    x = image().detach().float().requires_grad_()
    eager, model = compiled([same(3), same(5), nn.Identity()], x)
    exact, _ = steps(eager, eager, x, [0.4, 0.3, 0.3])
    (group,) = model.entries[0].lowered[0].groups
    with torch.autocast("cpu", torch.bfloat16):
        assert [member.index for member in group.suited(x, list(group.members))] == [0, 1]
        expected, actual = steps(eager, model, x, [0.4, 0.3, 0.3])
    assert actual["outputs"].dtype == expected["outputs"].dtype == torch.float32
    for part in ("outputs", "inputs", "weights"):
        assert_close(actual[part], exact[part], rtol=0.05, atol=0.05 * x.numel() ** 0.5)
    torch.testing.assert_close(actual["outputs"], exact["outputs"], rtol=0.02, atol=0.02)


def test_bfloat16_parameters() -> None:
    x = image().detach().bfloat16()
    eager, model = compiled([same(3), same(5)], x)
    assert found(model) == [("merge", [0, 1])]
    _, actual = steps(eager, model, x, [0.4, 0.6])
    expected, _ = steps(eager.float(), eager, x.float(), [0.4, 0.6])
    torch.testing.assert_close(actual["outputs"].float(), expected["outputs"], rtol=0.02, atol=0.02)
    assert actual["weights"]["op.0.weight"].dtype == torch.bfloat16
