"""What every pass owes: it fires, keeps off where it may not, keeps results; a second run changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nascompile.compiler.lower import is_shared
from nascompile.compiler.passes.drop_dead import drop_dead
from nascompile.compiler.passes.drop_identity import drop_identity
from nascompile.compiler.passes.drop_unused import drop_unused
from nascompile.compiler.passes.drop_zero_terms import drop_zero_terms
from nascompile.compiler.passes.functionalize_in_place import functionalize_in_place
from nascompile.compiler.passes.fuse_weighted_sums import fuse_weighted_sums
from nascompile.compiler.passes.lower_choices import lower_choices
from nascompile.compiler.passes.share_prefixes import share_prefixes
from nascompile.mutables import InputChoice, LayerChoice
from tests.comparing import Decided
from tests.compiler.graphs import Runs, assert_pass_keeps_results, targets, traced


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, dtype=torch.float64, generator=generator).requires_grad_()


def relu_linear(relu: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.ReLU() if relu is None else relu, nn.Linear(4, 4))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.identity = nn.Identity()
        self.op = LayerChoice([relu_linear(), nn.Identity(), relu_linear()], key="op")
        self.other = LayerChoice([relu_linear(), nn.Identity(), relu_linear()], key="op")
        self.choose = InputChoice(n_candidates=2, key="choose")


def of(program: Any, **parts: nn.Module) -> nn.Module:
    """A model with the parts of Base whose forward is `program(self, x)`."""
    torch.manual_seed(0)
    model = type(program.__name__, (Base,), {"forward": program})()
    for name, part in parts.items():
        setattr(model, name, part)
    return model.double()


def weights(model: nn.Module) -> dict[str, Tensor]:
    mutator = Decided(model)
    masks = {"op": [0.5, 0.3, 0.2], "choose": [0.4, 0.6]}
    mutator.decide(
        {
            key: torch.tensor(masks[key], dtype=torch.float64, requires_grad=True)
            for key in mutator.choices_by_key
        }
    )
    return mutator.decision


def plain(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.linear(x)) + 1


def lowered(gm: fx.GraphModule, *passes: Any) -> list[int]:
    return [one(gm) for one in (lower_choices, *passes)]


@pytest.mark.parametrize(
    "one",
    [
        drop_identity,
        drop_unused,
        lower_choices,
        functionalize_in_place,
        share_prefixes,
        fuse_weighted_sums,
        drop_dead,
        drop_zero_terms,
    ],
)
def test_a_graph_without_the_pattern_is_untouched(one: Any) -> None:
    gm = traced(of(plain))
    before = gm.graph.python_code("self").src
    assert one(gm) == 0
    assert gm.graph.python_code("self").src == before


# ----- drop_identity


def identities(self: Any, x: Tensor) -> Any:
    y = self.identity(self.linear(x))
    return y + self.identity(y), self.identity(x)


def test_drop_identity() -> None:
    gm = assert_pass_keeps_results(of(identities), drop_identity, rows())
    assert targets(gm) == ["linear", "add"]
    assert drop_identity(gm) == 0


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2


def test_drop_identity_keeps_those_with_hooks_and_subclasses() -> None:
    class Named(nn.Identity):
        pass

    hooked = nn.Identity()
    hooked.register_forward_hook(doubled)
    for part in (hooked, Named()):
        gm = traced(of(identities, identity=part))
        assert drop_identity(gm) == 0


# ----- drop_unused


def unused(self: Any, x: Tensor) -> Tensor:
    _size, _shape, _weight, _first = x.size(0), x.shape[1], self.linear.weight, x[0]
    self.linear(x)
    return self.linear(x)


def test_drop_unused() -> None:
    gm = assert_pass_keeps_results(of(unused), drop_unused, rows())
    # a layer whose result is unused may count batches: it stays
    assert targets(gm) == ["linear", "linear"]
    assert drop_unused(gm) == 0


def shape_used(self: Any, x: Tensor) -> Tensor:
    return self.linear(x).view(x.size(0), x.shape[1])


def test_drop_unused_keeps_what_is_used() -> None:
    gm = assert_pass_keeps_results(of(shape_used), drop_unused, rows())
    assert targets(gm) == targets(traced(of(shape_used)))


# ----- lower_choices


def choices(self: Any, x: Tensor) -> Tensor:
    return self.choose([self.op(x), self.other(self.linear(x))])


def test_lower_choices() -> None:
    model = of(choices)
    gm = assert_pass_keeps_results(model, lower_choices, rows(), masks=weights(model))
    assert targets(gm) == ["layer_choice_op", "linear", "layer_choice_other", "input_choice_choose"]
    assert lower_choices(gm) == 0


@pytest.mark.parametrize("reason", ["hook", "forward"])
def test_lower_choices_keeps_what_must_be_called(reason: str) -> None:
    model: Any = of(choices)
    if reason == "hook":
        model.op.register_forward_hook(lambda *_: None)
    else:
        model.op.forward = lambda x: x * 2
    gm = traced(model)
    assert lower_choices(gm) == 2
    assert gm.meta["notes"] == {"op": "has hooks or a replaced forward: called as a module"}


# ----- functionalize_in_place


def in_place(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x) * 2
    y += x
    y *= 3
    y -= x
    y /= 2
    return y


def test_functionalize_in_place() -> None:
    gm = assert_pass_keeps_results(of(in_place), functionalize_in_place, rows())
    assert targets(gm) == ["linear", "mul", *["out_of_place"] * 4]
    assert functionalize_in_place(gm) == 0


def repaired(self: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(self.linear(x))
    y += x
    return y


def test_functionalize_in_place_repairs_what_autograd_refuses() -> None:
    model = of(repaired)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(rows()).sum().backward()
    gm = traced(model)
    assert functionalize_in_place(gm) == 1


def used_later(self: Any, x: Tensor) -> Any:
    y = self.linear(x) * 2
    z = y
    y += x
    return y * z


def statements(self: Any, x: Tensor) -> Any:
    y = self.linear(x) * 2
    y.add_(x)
    y.mul_(3).sub_(1)
    y.div_(2)
    return y * y


@pytest.mark.parametrize(("program", "count"), [(used_later, 1), (statements, 4)])
def test_functionalize_in_place_hands_the_result_to_who_reads_the_value(program: Any, count: int) -> None:
    gm = assert_pass_keeps_results(of(program), functionalize_in_place, rows())
    assert targets(gm) == ["linear", "mul", *["out_of_place"] * count, "mul"]


def view_used_later(self: Any, x: Tensor) -> Any:
    y = self.linear(x) * 2
    z = y[0]
    y += x
    return y.sum() + z


def view_changed(self: Any, x: Tensor) -> Any:
    y = self.linear(x) * 2
    z = y[0]
    z += 1
    return y * z.sum()


def through_identity(self: Any, x: Tensor) -> Any:
    y = self.linear(x) * 2
    z = F.dropout(y, training=False)
    y += x
    return y + z


def input_changed(self: Any, x: Tensor) -> Any:
    x += 1
    return self.linear(x)


def parameter_changed(self: Any, x: Tensor) -> Any:
    with_scale = self.identity.scale
    with_scale += 1
    return self.linear(x) * with_scale


@pytest.mark.parametrize(
    "program", [view_used_later, view_changed, through_identity, input_changed, parameter_changed]
)
def test_functionalize_in_place_keeps_what_can_be_seen(program: Any) -> None:
    model: Any = of(program)
    model.identity.register_buffer("scale", torch.zeros(4, dtype=torch.float64))
    gm = traced(model)
    functionalize_in_place(gm)
    assert [name for name in targets(gm) if name.startswith("i") and name.startswith("iadd")] == ["iadd"]

    def restart(gm: fx.GraphModule) -> None:
        functionalize_in_place(gm)
        model.identity.scale.zero_()

    model.identity.scale.zero_()
    if program is not parameter_changed:
        assert_pass_keeps_results(model, restart, rows())


# ----- share_prefixes


def two_choices(self: Any, x: Tensor) -> Tensor:
    x = self.linear(x)
    return self.op(x) + self.other(x)


def test_share_prefixes() -> None:
    model = of(two_choices)
    gm = assert_pass_keeps_results(
        model, lambda gm: lowered(gm, share_prefixes), rows(), masks=weights(model)
    )
    assert sum(is_shared(node) for node in gm.graph.nodes) == 1
    assert share_prefixes(gm) == 0


def test_share_prefixes_counts_what_it_saves() -> None:
    assert lowered(traced(of(two_choices)), share_prefixes) == [2, 3]


class FunctionalRelu(nn.Module):
    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.leaky_relu(x, self.slope))


def test_share_prefixes_tells_hyper_parameters_apart() -> None:
    candidates = [
        FunctionalRelu(0.1),
        FunctionalRelu(0.2),
        FunctionalRelu(0.1),
        relu_linear(nn.LeakyReLU(0.1)),
    ]
    model = of(one_choice, op=LayerChoice(candidates, key="four"))
    mask = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    Decided(model).decide({"four": mask, "op": torch.ones(3), "choose": torch.ones(2)})
    assert_pass_keeps_results(model, lambda gm: lowered(gm, share_prefixes), rows(), masks={"four": mask})
    # of the two equal functions one is saved; the module is another way to write it
    assert lowered(traced(model), share_prefixes)[1] == 1


def one_choice(self: Any, x: Tensor) -> Tensor:
    return self.op(self.linear(x))


class Mutates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.linear(x)


def in_place_relu() -> nn.Module:
    return LayerChoice([relu_linear(nn.ReLU(inplace=True)), nn.Identity(), relu_linear()], key="op")


def mutates() -> nn.Module:
    return LayerChoice([Mutates(), nn.Identity(), relu_linear()], key="op")


class Opaque(nn.Module):
    """Changes its argument in place, in a way that is not traced."""

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().sum() > -1e9:
            x += 1
        return x


def source_changed(self: Any, x: Tensor) -> Tensor:
    x = self.linear(x)
    y = self.op(x)
    x += 1
    return y + self.other(x)


def view_of_source_changed(self: Any, x: Tensor) -> Tensor:
    x = self.linear(x)
    y = self.op(x)
    v = x[0]
    v += 1
    return y + self.other(x)


def source_changed_inside(self: Any, x: Tensor) -> Tensor:
    x = self.linear(x)
    y = self.op(x)
    z = self.identity(x)
    return y + self.other(x) + z


def view_changed_by_a_candidate(self: Any, x: Tensor) -> Tensor:
    x = self.linear(x)
    y = self.op(x)
    z = self.third(x.view(2, 4))
    return y + self.op(x) + z


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        (source_changed, {}),
        (view_of_source_changed, {}),
        (source_changed_inside, {"identity": Opaque}),
        (view_changed_by_a_candidate, {"third": mutates}),
        (
            two_choices,
            {"op": in_place_relu},
        ),
        (two_choices, {"op": mutates}),
    ],
)
@pytest.mark.parametrize("mask", [[False, False, True], [True, False, False]])
def test_share_prefixes_keeps_off_what_changes_in_place(
    program: Any, parts: dict[str, Any], mask: list[bool]
) -> None:
    model = of(program, **{name: part() for name, part in parts.items()})
    Decided(model).decide({"op": torch.tensor(mask), "choose": torch.ones(2)})
    gm = traced(model)
    assert lowered(gm, share_prefixes)[1] == 0
    assert all(
        "prefixes not shared" in note for path, note in gm.meta["notes"].items() if path in ("op", "other")
    )
    assert "op" in gm.meta["notes"]
    with torch.no_grad():
        expected = model(rows().detach())
        compiled = traced(model)
        lowered(compiled, share_prefixes)
        torch.testing.assert_close(Runs(model, compiled)(rows().detach()), expected, rtol=0, atol=0)


# ----- fuse_weighted_sums


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_fuse_weighted_sums(reduction: str) -> None:
    model: Any = of(choices)
    for choice in (model.op, model.other, model.choose):
        choice.reduction = reduction
    gm = assert_pass_keeps_results(
        model, lambda gm: lowered(gm, fuse_weighted_sums), rows(), masks=weights(model)
    )
    assert [n.target.pattern.name for n in gm.graph.nodes if hasattr(n.target, "pattern")] == [
        "mixed_sum"
    ] * 3
    assert fuse_weighted_sums(gm) == 0


def test_fuse_weighted_sums_says_why_not() -> None:
    model: Any = of(choices)
    model.op.reduction = "none"
    model.other.reduction = "concat"
    model.choose = InputChoice(n_candidates=1)
    gm = traced(model)
    assert lowered(gm, fuse_weighted_sums) == [3, 0]
    assert gm.meta["notes"] == {
        "op": 'mixed_sum: reduction "none" is not a sum',
        "other": 'mixed_sum: reduction "concat" is not a sum',
        "choose": "mixed_sum: there is only one candidate",
    }


def test_fuse_weighted_sums_keeps_the_order_of_candidates_in_place() -> None:
    candidates = [nn.Identity(), nn.ReLU(inplace=True)]
    model: Any = of(one_choice, op=LayerChoice(candidates, key="two"))
    gm = traced(model)
    assert lowered(gm, fuse_weighted_sums) == [1, 0]
    assert "which candidate '0' may return" in gm.meta["notes"]["op"]
    # the other way round nothing is handed on before it is changed
    model = of(one_choice, op=LayerChoice(candidates[::-1], key="two"))
    assert lowered(traced(model), fuse_weighted_sums) == [1, 1]
