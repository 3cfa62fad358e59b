"""The contract of `prune`, sentence by sentence, on networks written by hand."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nascompile
from nascompile.compiler.errors import ArchitectureError, NascompileError
from nascompile.compiler.lean import Combination
from nascompile.compiler.mutables import Mutable
from nascompile.compiler.prune import load_supernet
from nascompile.fixed import FixedArchitecture, apply_fixed_architecture
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from tests.comparing import assert_same
from tests.compiler.programs import conv, image


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_lean(model: nn.Module, architecture: Any, *args: Any, parameters: int, islands: int = 0) -> Any:
    """Prune and check the whole contract; gives the lean network."""
    model = model.double()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    lean = nascompile.prune(model, architecture, args)
    assert_same(dict(model.state_dict()), dict(before), exact=True)
    assert [module.training for module in model.modules()] == modes
    assert not {id(t) for t in model.state_dict(keep_vars=True).values()} & {
        id(t) for t in lean.state_dict().values()
    }
    assert not [module for module in lean.modules() if isinstance(module, Mutable)]
    assert numbers(lean) == parameters
    assert len(lean.meta["nascompile"]["islands"]) == islands
    mutator = FixedArchitecture(copy.deepcopy(model), architecture)
    mutator.reset()
    assert_same(lean.eval()(*args), mutator.__dict__["model"].eval()(*args), exact=True)
    return lean


class Guide(nn.Module):
    """The model of NNI's guide: a choice of convolutions, and an optional skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = LayerChoice(OrderedDict([("conv5", conv(5)), ("conv3", conv(3))]), key="conv1")
        self.mid = LayerChoice([conv(3), conv(5)], key="mid")
        self.skip = InputChoice(n_candidates=1, key="skip")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        old = x
        x = F.relu(self.mid(x))
        x0 = self.skip([old])
        if x0 is not None:
            x += x0
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("skip", [[], [0]])
def test_the_guide(skip: list[int]) -> None:
    lean = assert_lean(
        Guide(), {"conv1": "conv3", "mid": 1, "skip": skip}, image(), parameters=148 + 404 + 15
    )
    names = ["conv1.weight", "conv1.bias", "mid.weight", "mid.bias", "head.weight", "head.bias"]
    assert [name for name, _ in lean.named_parameters()] == names
    assert ("add" in lean.code) == bool(skip)


def test_names_are_those_of_the_fixed_model() -> None:
    architecture = {"conv1": "conv5", "mid": 0, "skip": []}
    lean = nascompile.prune(Guide(), architecture)
    fixed = Guide()
    apply_fixed_architecture(fixed, architecture)
    assert set(lean.state_dict()) == set(fixed.state_dict())
    lean.load_state_dict(fixed.state_dict())
    assert_same(lean.eval()(image().float()), fixed.eval()(image().float()), exact=True)


class Upstream(nn.Module):
    """The producers of an input that was not chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(conv(3), nn.BatchNorm2d(4))
        self.right = LayerChoice([conv(1), conv(5)], key="right")
        self.choose = InputChoice(choose_from=["", "right"], n_chosen=1, key="choose", return_mask=True)

    def forward(self, x: Tensor) -> Any:
        y, mask = self.choose({"": self.left(x), "right": self.right(x)})
        return y, mask


@pytest.mark.parametrize(("chosen", "parameters"), [(0, 148 + 8), ("right", 20)])
def test_nothing_upstream_of_an_input_that_was_not_chosen(chosen: Any, parameters: int) -> None:
    assert_lean(Upstream(), {"right": 0, "choose": chosen}, image(), parameters=parameters)


def test_at_the_root() -> None:
    lean = assert_lean(LayerChoice([conv(1), conv(3)], key="op"), {"op": 1}, image(), parameters=148)
    assert len(list(lean.modules())) <= 3
    choice = InputChoice(n_candidates=2, key="choose")
    assert_lean(choice, {"choose": [1]}, [image(), image() + 1], parameters=0)


def test_in_containers_and_registered_twice() -> None:
    shared = LayerChoice([conv(1), conv(3)], key="shared")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = shared
            self.sequence = nn.Sequential(shared, nn.ReLU(), LayerChoice([conv(5), conv(1)], key="other"))
            self.list = nn.ModuleList([nn.ModuleDict({"a": shared})])

        def forward(self, x: Tensor) -> Tensor:
            return self.list[0]["a"](self.sequence(self.first(x)))  # type: ignore[index]

    lean = assert_lean(Twice(), {"shared": 1, "other": 1}, image(), parameters=148 + 20)
    # one parameter for every place in which it is registered
    assert len(list(lean.named_parameters(remove_duplicate=False))) >= 4


def test_nested_choices() -> None:
    class Candidate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LayerChoice([conv(1), conv(3)], key="inner")

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x

    model = nn.Sequential(
        LayerChoice([Candidate(), conv(5), LayerChoice([conv(1), conv(3)], key="deep")], key="outer")
    )
    assert_lean(model, {"outer": 0, "inner": 1, "deep": 0}, image(), parameters=148)
    assert_lean(model, {"outer": 1, "inner": 1, "deep": 0}, image(), parameters=404)
    lean = assert_lean(model, {"outer": 2, "inner": 1, "deep": 1}, image(), parameters=148)
    assert [name for name, _ in lean.named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("reduction", ["sum", "mean", "concat", "none"])
@pytest.mark.parametrize(
    "mask", [[True, False, True], [0.5, 0.0, -1.5], [0.0, 0.25, 0.0], [False, True, False]]
)
def test_reductions(reduction: str, mask: list[Any]) -> None:
    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([conv(1), conv(3), nn.Identity()], reduction=reduction, key="op")

        def forward(self, x: Tensor) -> Any:
            return self.op(x)

    sizes = (20, 148, 0)
    assert_lean(
        Reduced(), {"op": mask}, image(), parameters=sum(s for s, m in zip(sizes, mask, strict=True) if m)
    )


def test_scopes_and_shared_keys() -> None:
    class Scope(MutableScope):
        def __init__(self) -> None:
            super().__init__("scope")
            self.op = LayerChoice([conv(1), conv(3)], key="shared")

        def forward(self, x: Tensor) -> Tensor:
            return self.op(x)

    model = nn.Sequential(Scope(), Scope())
    assert_lean(model, {"shared": 1}, image(), parameters=2 * 148)


class DropPath(nn.Module):
    """Training and evaluation take different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([conv(1), conv(3)], key="op")
        self.aux = conv(5)

    def forward(self, x: Tensor) -> Any:
        x = self.op(x)
        if self.training:
            return F.dropout(x, 0.5), self.aux(x)
        return x


def test_two_ways() -> None:
    lean = assert_lean(DropPath(), {"op": 0}, image(), parameters=20 + 404)
    assert isinstance(lean.eval()(image()), Tensor)
    out, aux = lean.train()(image())
    assert aux.shape == out.shape
    assert (out == 0).any()
    clone = copy.deepcopy(lean)
    assert isinstance(clone.eval()(image()), Tensor)
    assert isinstance(lean(image()), tuple)


class Island(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([conv(1), conv(3)], key="op")
        self.other = LayerChoice([conv(1), conv(3)], key="other", return_mask=True)
        self.choose = InputChoice(2, n_chosen=None, key="choose")

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        if y.mean() > 0:
            y = -y
        z, _mask = self.other(y)
        out = self.choose([y, z])
        return x if out is None else out


@pytest.mark.parametrize("choose", [[True, False], [True, True], [False, False], [0.25, 0.5]])
def test_islands_keep_no_choice(choose: list[Any]) -> None:
    lean = assert_lean(
        nn.Sequential(Island(), conv(1)),
        {"op": 0, "other": [True, True], "choose": choose},
        image(),
        parameters=20 + (20 + 148) + 20,
        islands=1,
    )
    assert "branch on a tensor" in lean.meta["nascompile"]["islands"]["0"]
    assert any(isinstance(module, Combination) for module in lean.modules())


def test_several_side_by_side() -> None:
    model = Guide().double()
    leans = [nascompile.prune(model, {"conv1": c, "mid": m, "skip": []}) for c in (0, 1) for m in (0, 1)]
    assert len({id(parameter) for lean in leans for parameter in lean.parameters()}) == 4 * 6
    with torch.no_grad():
        for parameter in leans[0].parameters():
            parameter.zero_()
    assert leans[1](image()).abs().sum() > 0


def test_fresh_weights() -> None:
    model = Guide().double()
    torch.manual_seed(1)
    fresh = nascompile.prune(model, {"conv1": 0, "mid": 0, "skip": []}, weights="fresh")
    inherited = nascompile.prune(model, {"conv1": 0, "mid": 0, "skip": []})
    for (name, one), other in zip(fresh.named_parameters(), inherited.parameters(), strict=True):
        assert not torch.equal(one, other), name
    load_supernet(fresh, model.state_dict())
    assert_same(dict(fresh.state_dict()), dict(inherited.state_dict()), exact=True)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_fresh_weights_need_a_way_to_be_made() -> None:
    model = nn.Sequential(LayerChoice([Own(), conv(1)], key="op"))
    with pytest.raises(NascompileError, match=r"'0\.0\.weight' belongs to a module without reset_parameters"):
        nascompile.prune(model, {"op": 0}, weights="fresh")
    # what is not chosen is not asked for
    assert numbers(nascompile.prune(model, {"op": 1}, weights="fresh")) == 20
    with pytest.raises(NascompileError, match="weights is 'old'"):
        nascompile.prune(model, {"op": 1}, weights="old")


def test_another_supernet_is_refused_before_anything_is_copied() -> None:
    lean = nascompile.prune(Guide(), {"conv1": 0, "mid": 0, "skip": []})
    before = copy.deepcopy(lean.state_dict())
    state = Guide().state_dict()
    state["head.weight"] = torch.zeros(5, 4)
    with pytest.raises(
        NascompileError, match=r"'head.weight' of the supernet has shape \(5, 4\), expected \(3, 4\)"
    ):
        load_supernet(lean, state)
    del state["head.weight"]
    with pytest.raises(NascompileError, match=r"the supernet has no tensor 'head\.weight'"):
        load_supernet(lean, state)
    assert_same(dict(lean.state_dict()), dict(before), exact=True)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"conv1": 0, "mid": 0}, "Missing keys in fixed architecture: skip"),
        ({"conv1": 0, "mid": 0, "skip": [], "more": 1}, "Unexpected keys found in fixed architecture: more"),
        ({"conv1": 2, "mid": 0, "skip": []}, "key 'conv1': index 2 is out of range, expected 0 to 1"),
        (
            {"conv1": "conv7", "mid": 0, "skip": []},
            "'conv7' is not a candidate; candidates: 'conv5', 'conv3'",
        ),
    ],
)
def test_architectures_of_other_models(architecture: Any, words: str) -> None:
    with pytest.raises(ArchitectureError, match=words):
        nascompile.prune(Guide(), architecture)


def test_from_a_file_and_from_a_compiled_model(tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps({"conv1": "conv3", "mid": [False, True], "skip": [0]}))
    model = Guide().double()
    lean = nascompile.prune(nascompile.compile(model, image()), path)
    assert lean.meta["nascompile"]["architecture"] == {"conv1": "conv3", "mid": 1, "skip": 0}
    assert_same(lean.eval()(image()), nascompile.prune(model, path).eval()(image()), exact=True)


def test_a_bound_mutator_is_left_alone() -> None:
    model = Guide().double()
    mutator = FixedArchitecture(model, {"conv1": 0, "mid": 0, "skip": []})
    mutator.reset()
    nascompile.prune(model, {"conv1": 1, "mid": 1, "skip": []}, image())
    assert model.mid.bound_mutator is mutator
    assert mutator.decision["mid"] == [True, False]


def test_frozen_batch_norm_stays_frozen() -> None:
    model = nn.Sequential(LayerChoice([conv(1), conv(3)], key="op"), nn.BatchNorm2d(4)).double()
    model[1].eval()
    lean = nascompile.prune(model, {"op": 0})
    assert lean.training
    before = copy.deepcopy(lean.state_dict())
    lean(image())
    assert_same(dict(lean.state_dict()), dict(before), exact=True)


def test_star_arguments_with_a_zero() -> None:
    class Star(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([conv(1), Zero()], key="op")

        def forward(self, *xs: Tensor, more: Tensor | None = None) -> Tensor:
            return xs[0] + self.op(xs[1])

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul(0)

    assert_lean(Star(), {"op": 1}, image(), image() + 1, parameters=0)


def test_volatile_buffers_and_plain_tensors() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([conv(1), conv(3)], key="op")
            self.constant = torch.full((4, 1, 1), 2.0, dtype=torch.float64)
            self.register_buffer("volatile", torch.ones(4, 1, 1), persistent=False)
            self.register_buffer("kept", torch.ones(4, 1, 1))
            self.register_buffer("unused", torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.op(x) * self.constant + self.volatile + self.kept

    lean = assert_lean(Constants(), {"op": 0}, image(), parameters=20)
    assert set(lean.state_dict()) == {"op.weight", "op.bias", "kept"}
    assert lean.half()(image().half().detach()).dtype == torch.float16
