"""Parameters, FLOPs and shapes against numbers worked out by hand; the model is as before afterwards."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler.errors import NascompileError, SpaceError
from nascompile.compiler.measure import Count, check_weighted, count, profile_choices
from nascompile.compiler.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.profiler import flop_counter


def conv(kernel: int, channels: int = 4, padding: int | None = None) -> nn.Conv2d:
    padding = kernel // 2 if padding is None else padding
    return nn.Conv2d(channels, channels, kernel, padding=padding, bias=False)


def conv_flops(kernel: int, batch: int = 2, channels: int = 4, size: int = 8) -> int:
    return 2 * batch * channels * channels * kernel * kernel * size * size


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1)
        named: OrderedDict[str, nn.Module | None] = OrderedDict(
            three=conv(3), five=conv(5), skip=nn.Identity()
        )
        self.op = LayerChoice(named, key="op")
        self.norm = nn.BatchNorm2d(4)
        self.skip = InputChoice(n_candidates=2, n_chosen=1, key="skip")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.skip([y, self.norm(self.op(y))])
        return self.head(y.mean((2, 3)))


X = torch.ones(2, 4, 8, 8)
OUTSIDE = conv_flops(1) + 2 * 2 * 4 * 3


def test_parameters_flops_and_shapes_of_every_candidate():
    profiles = profile_choices(Net(), X)
    assert list(profiles) == ["op", "skip"]
    op = profiles["op"]
    assert [c.name for c in op.candidates] == ["three", "five", "skip"]
    assert [c.parameters for c in op.candidates] == [16 * 9, 16 * 25, 0]
    assert [c.flops for c in op.candidates] == [conv_flops(3), conv_flops(5), 0]
    assert {c.output for c in op.candidates} == {(2, 4, 8, 8)}
    assert {c.dtypes for c in op.candidates} == {(torch.float32,)}
    assert op.calls == ((2, 4, 8, 8),)
    assert op.kind == "LayerChoice"
    assert op.inside is None
    skip = profiles["skip"]
    assert skip.kind == "InputChoice"
    assert skip.n_chosen == 1
    assert skip.calls == ([(2, 4, 8, 8), (2, 4, 8, 8)],)


def test_count_of_the_supernet_holds_all_candidates():
    net = Net()
    expected = sum(p.numel() for p in net.parameters())
    total = count(net, X)
    assert total == Count(expected, OUTSIDE + conv_flops(3) + conv_flops(5), 2)
    assert total.flops_per_sample == total.flops / 2


def test_count_of_a_plain_module_counts_a_shared_parameter_once():
    layer = nn.Linear(4, 4)
    assert count(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(3, 4)) == Count(20, 2 * 2 * 3 * 16, 3)


@pytest.mark.parametrize(
    ("module", "inputs", "flops"),
    [
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), torch.ones(1, 4, 5, 5), 2 * 4 * 9 * 9),
        (nn.ConvTranspose1d(2, 3, 2, bias=False), torch.ones(1, 2, 5), 2 * 2 * 3 * 2 * 5),
        (nn.LSTM(6, 8, 2), torch.ones(5, 3, 6), 2 * 15 * 4 * 8 * (6 + 8 + 8 + 8)),
        (nn.GRU(6, 8), torch.ones(5, 3, 6), 2 * 15 * 3 * 8 * (6 + 8)),
        # projections to q, k, v and out, then q kᵀ and its product with v
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            torch.ones(2, 5, 8),
            2 * 10 * 8 * 8 * 4 + 2 * 2 * 2 * 5 * 5 * 8 + 2 * 10 * 8 * 16 * 2,
        ),
        (nn.BatchNorm2d(4), torch.ones(2, 4, 3, 3), 0),
    ],
)
def test_flops_of_layers_equal_the_formula(module: nn.Module, inputs: Tensor, flops: int):
    assert count(module, inputs).flops == flops


def test_matrix_vector_products_are_counted():
    with flop_counter() as counter:
        _ = torch.ones(3, 4) @ torch.ones(4)
        torch.addmv(torch.ones(3), torch.ones(3, 4), torch.ones(4))
        _ = torch.ones(4) @ torch.ones(4)
    assert counter.get_total_flops() == 2 * 12 + 2 * 12 + 2 * 4


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice([conv(3), conv(5)], key="inner")
        self.outer = LayerChoice([nn.Sequential(conv(1), inner), conv(1)], key="outer")

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.outer(x))


def test_nested_choices_are_measured_inside_their_candidate_and_counted_once():
    profiles = profile_choices(Nested(), X)
    outer, inner = profiles["outer"], profiles["outer.0.1"]
    assert inner.inside == ("outer", "0")
    assert len(outer.calls) == 2
    assert len(inner.calls) == 2
    assert inner.candidates[1].flops == 2 * conv_flops(5)
    first = outer.candidates[0]
    assert first.flops == 2 * (conv_flops(1) + conv_flops(3) + conv_flops(5))
    assert first.own_flops == 2 * conv_flops(1)
    assert first.parameters == 16 * (1 + 9 + 25)
    assert count(Nested(), X).flops == 2 * (2 * conv_flops(1) + conv_flops(3) + conv_flops(5))


def test_a_choice_that_is_the_model_and_one_without_candidates():
    profiles = profile_choices(LayerChoice([None, conv(3)], key="root"), X)
    assert list(profiles) == [""]
    missing, present = profiles[""].candidates
    assert (missing.error, missing.output, missing.parameters) == ("is None", None, 0)
    assert present.output == (2, 4, 8, 8)
    assert present.error is None


class Widths(nn.Module):
    """The second layer fits the first one only when both take the same candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.a = LayerChoice([nn.Linear(4, 2), nn.Linear(4, 6)], key="width")
        self.b = LayerChoice([nn.Linear(2, 3), nn.Linear(6, 3)], key="width")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_candidates_that_fit_one_decision_only_are_measured_under_it():
    profiles = profile_choices(Widths(), torch.ones(1, 4))
    assert [c.output for c in profiles["a"].candidates] == [(1, 2), (1, 6)]
    assert [c.flops for c in profiles["b"].candidates] == [2 * 2 * 3, 2 * 6 * 3]
    assert [c.error for c in profiles["b"].candidates] == [None, None]


class SecondOnly(nn.Module):
    """Runs only with the second candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.a = LayerChoice([nn.Linear(4, 2), nn.Linear(4, 6)])
        self.b = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_model_that_the_first_candidate_breaks_runs_under_the_next_decision():
    assert [c.output for c in profile_choices(SecondOnly(), torch.ones(1, 4))["a"].candidates] == [
        (1, 2),
        (1, 6),
    ]
    assert count(SecondOnly(), torch.ones(1, 4)).flops == 2 * (4 * 2 + 4 * 6 + 6 * 3)


def test_a_model_that_never_runs_is_one_clear_error():
    with pytest.raises(
        NascompileError, match=r"does not run on the example inputs \(shapes: \(2, 3, 8, 8\)\).*RuntimeErr"
    ):
        profile_choices(Net(), torch.ones(2, 3, 8, 8))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.skip = InputChoice(n_candidates=1, key="skip")
        self.op = LayerChoice([nn.Linear(4, 4), nn.Identity()], key="op")

    def forward(self, x: Tensor) -> Tensor:
        kept = self.skip([x])
        return self.op(x) if kept is None else x


def test_a_choice_behind_a_branch_is_reached_by_another_decision():
    profiles = profile_choices(Optional(), torch.ones(1, 4))
    assert [c.output for c in profiles["op"].candidates] == [(1, 4), (1, 4)]


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = (LayerChoice([nn.Linear(4, 4), nn.Identity()]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_choice_that_is_never_called_says_so():
    unused = profile_choices(Dead(), torch.ones(1, 4))["unused"]
    assert unused.calls == ()
    assert [c.error for c in unused.candidates] == ["never called", "never called"]
    assert [c.parameters for c in unused.candidates] == [20, 0]


def test_unequal_shapes_are_recorded_and_named_by_check_weighted():
    named: OrderedDict[str, nn.Module | None] = OrderedDict(conv3=conv(3), conv5=conv(5, padding=1))
    net = nn.Sequential(LayerChoice(named, key="stem.op"), nn.AdaptiveAvgPool2d(1))
    profiles = profile_choices(net, X)
    assert profiles["0"].candidates[1].output == (2, 4, 6, 6)
    with pytest.raises(SpaceError) as caught:
        check_weighted(profiles)
    assert str(caught.value) == (
        'choice "stem.op": candidate "conv5" returns (2, 4, 6, 6), "conv3" returns (2, 4, 8, 8)'
    )


@pytest.mark.parametrize(("reduction", "legal"), [("concat", True), ("none", True), ("sum", False)])
def test_check_weighted_follows_the_reduction(reduction: str, legal: bool):
    net = nn.Sequential(LayerChoice([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)], reduction=reduction, key="k"))
    profiles = profile_choices(net, X)
    if legal:
        check_weighted(profiles)
    else:
        with pytest.raises(SpaceError, match='choice "k"'):
            check_weighted(profiles)


def test_check_weighted_wants_tensors():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    profiles = profile_choices(LayerChoice([Pair(), Pair()], key="pair"), torch.ones(2, 4))
    assert profiles[""].candidates[0].output == ((2, 4), (2, 4))
    with pytest.raises(SpaceError, match=r'"0" returns .* expected one tensor'):
        check_weighted(profiles)


class First(Mutator):
    def sample_search(self) -> dict[str, Any]:
        return {key: [True] + [False] * (len(choice) - 1) for key, choice in self.choices_by_key.items()}

    sample_final = sample_search


class Messy(nn.Module):
    """Draws numbers, changes a buffer, replaces another and counts its calls."""

    steps: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scope = Scoped()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.last = x * random.random() * np.random.rand() * torch.rand(())
        x.add_(1)
        return self.scope(x)


class Scoped(MutableScope):
    def __init__(self) -> None:
        super().__init__(key="scope")
        self.op = LayerChoice(
            [nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(inplace=True))], key="op"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@pytest.mark.parametrize("bound", [False, True])
def test_the_model_and_its_mutator_are_untouched(bound: bool):
    net = Messy()
    net.scope.op[1].eval()
    mutator = First(net) if bound else None
    if mutator is not None:
        mutator.reset()
        decision = mutator.decision
    x, last = torch.ones(2, 4), net.last
    state = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    profile_choices(net, x)
    assert [m.training for m in net.modules()] == modes
    assert net.calls == 0
    assert net.last is last
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(x, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2]  # type: ignore[index]
    assert net.scope.op.bound_mutator is mutator
    assert net.scope.bound_mutator is mutator
    if mutator is not None:
        assert mutator.decision is decision


def test_lazy_modules_are_named():
    with pytest.raises(NascompileError, match=r"0\.weight"):
        count(nn.Sequential(nn.LazyLinear(3)), torch.ones(1, 4))


def test_inputs_of_any_nesting():
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([nn.Bilinear(4, 4, 2), nn.Bilinear(4, 4, 2)])

        def forward(self, batch: dict[str, Any], scale: float) -> Tensor:
            return self.op(batch["a"], input2=batch["b"][0]) * scale

    profiles = profile_choices(Tree(), ({"a": torch.ones(3, 4), "b": [torch.ones(3, 4)]}, 2.0))
    assert profiles["op"].calls == ({0: (3, 4), "input2": (3, 4)},)
    assert count(Tree(), ({"a": torch.ones(3, 4), "b": [torch.ones(3, 4)]}, 2.0)).batch == 3
