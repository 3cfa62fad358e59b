"""What users write: LayerChoice, InputChoice, MutableScope, uncompiled, with NNI's names and semantics."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler.errors import SpaceError
from nascompile.compiler.space import all_choices, choices
from nascompile.mutables import InputChoice, LayerChoice, Mutable, MutableScope
from nascompile.mutator import Mutator
from tests.comparing import Decided


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def layers(**options: Any) -> LayerChoice:
    return LayerChoice([Times(1), Times(10), Times(100)], key="op", **options)


def decided(module: nn.Module, **masks: Any) -> nn.Module:
    Decided(module).decide(masks)
    return module


X = torch.ones(2, 3)

# ----- masks and reductions

SECOND_AND_THIRD = [
    [False, True, True],
    [0, 1, 1],
    numpy.array([False, True, True]),
    numpy.array([0, 1, 1]),
    torch.tensor([False, True, True]),
    torch.tensor([0, 1, 1]),
    torch.tensor([0, 1, 1], dtype=torch.uint8),
]
WEIGHTS = [
    [0.0, 1.0, 2.0],
    numpy.array([0.0, 1.0, 2.0], dtype=numpy.float32),
    numpy.array([0.0, 1.0, 2.0]),
    *(
        torch.tensor([0.0, 1.0, 2.0], dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ),
]


@pytest.mark.parametrize(
    "mask", SECOND_AND_THIRD, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'dtype', '')}"
)
def test_masks_of_every_kind_choose(mask: Any) -> None:
    assert torch.equal(decided(layers(), op=mask)(X), 110 * X)


@pytest.mark.parametrize("mask", WEIGHTS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'dtype', '')}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_of_every_kind_weigh(mask: Any, dtype: torch.dtype) -> None:
    out = decided(layers(), op=mask).to(dtype)(X.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out, 210 * X.to(dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", 110 * X),
        ("mean", 55 * X),
        ("concat", torch.cat([10 * X, 100 * X], 1)),
        ("none", [10 * X, 100 * X]),
    ],
)
def test_reductions(reduction: str, expected: Any) -> None:
    out = decided(layers(reduction=reduction), op=[False, True, True])(X)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    inputs = InputChoice(n_candidates=3, reduction=reduction, key="op")
    out = decided(inputs, op=[False, True, True])([X, 10 * X, 100 * X])
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean", "concat", "none"])
def test_none_one_and_weighted_mean(reduction: str) -> None:
    choice = decided(layers(reduction=reduction), op=[False] * 3)
    assert choice(X) == ([] if reduction == "none" else None)
    choice.bound_mutator.decide({"op": [False, True, False]})  # type: ignore[union-attr]
    out = choice(X)
    torch.testing.assert_close(out[0] if reduction == "none" else out, 10 * X, rtol=0, atol=0)
    choice.bound_mutator.decide({"op": [0.5, 0.5, 0.0]})  # type: ignore[union-attr]
    if reduction == "mean":
        torch.testing.assert_close(choice(X), 5.5 * X / 2)


def test_return_mask() -> None:
    mask = torch.tensor([0.0, 1.0, 0.0])
    out, returned = decided(layers(return_mask=True), op=mask)(X)
    assert returned is mask
    assert torch.equal(out, 10 * X)


def test_a_candidate_that_is_not_chosen_is_not_run() -> None:
    choice = layers()
    choice[0].register_forward_hook(lambda *_: pytest.fail("it ran"))
    decided(choice, op=[0.0, 1.0, 0.0])(X)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([True, False], r"choice 'op': mask has shape \(2,\), expected \(3,\)"),
        (torch.ones(3, 1), r"mask has shape \(3, 1\), expected \(3,\)"),
        ("all", "choice 'op': mask 'all' is not a sequence of numbers or booleans"),
    ],
)
def test_unusable_masks(mask: Any, words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        decided(layers(), op=mask)(X)


def test_outputs_that_do_not_go_together_are_named() -> None:
    choice = LayerChoice(OrderedDict([("wide", nn.Linear(3, 5)), ("narrow", nn.Linear(3, 4))]), key="op")
    with pytest.raises(
        SpaceError, match=r"choice 'op': candidate 'narrow' returns \(2, 4\), 'wide' returns \(2, 5\)"
    ):
        decided(choice, op=[0.5, 0.5])(X)
    choice = LayerChoice([nn.Identity(), nn.Linear(3, 4)], key="op", reduction="concat")
    assert decided(choice, op=[True, True])(X).shape == (2, 7)


# ----- LayerChoice as a container


def test_items() -> None:
    choice = LayerChoice(OrderedDict([("a", Times(1)), ("b", Times(2)), ("c", Times(3))]))
    assert len(choice) == 3
    assert choice.names == ["a", "b", "c"]
    assert list(choice) == [choice["a"], choice["b"], choice["c"]]
    assert choice[-1] is choice["c"]
    assert choice[0:2] == [choice["a"], choice["b"]]
    assert "b" in choice
    assert choice["b"] in choice
    assert [name for name, _ in choice.named_parameters()] == ["a.factor", "b.factor", "c.factor"]
    choice["b"] = Times(4)
    choice[0] = Times(5)
    assert [candidate.factor.item() for candidate in choice] == [5, 4, 3]
    del choice[1]
    assert choice.names == ["a", "c"]
    del choice["a"]
    assert len(choice) == 1
    del choice[:]
    assert len(choice) == 0
    with pytest.raises(KeyError, match="has no candidate 'x'"):
        choice["x"] = Times(1)


def test_names_stay_when_a_candidate_goes() -> None:
    choice = layers()
    del choice[1]
    assert choice.names == ["0", "2"]
    assert torch.equal(decided(choice, op=[False, True])(X), 100 * X)


def test_deprecated_spellings_warn() -> None:
    with pytest.warns(DeprecationWarning, match="len"):
        assert layers().length == 3
    with pytest.warns(DeprecationWarning, match="list"):
        assert len(layers().choices) == 3


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LayerChoice({Times(1)}), TypeError, "Unsupported op_candidates type: set"),  # type: ignore[arg-type]
        (lambda: LayerChoice([3]), TypeError, "candidate '0' is a int, expected a torch.nn.Module"),  # type: ignore[list-item]
        (lambda: LayerChoice(OrderedDict(key=Times(1))), ValueError, "candidate name 'key' is reserved"),
        (
            lambda: LayerChoice([Times(1)], reduction="max"),
            ValueError,
            'Unrecognized reduction policy: "max"',
        ),
        (lambda: InputChoice(), ValueError, "needs n_candidates or choose_from"),
        (lambda: InputChoice(n_candidates=0), ValueError, "n_candidates is 0, expected at least 1"),
        (lambda: InputChoice(2, ["a"]), ValueError, "choose_from has 1 entries, expected n_candidates = 2"),
        (lambda: InputChoice(2, n_chosen=3), ValueError, "n_chosen is 3, expected None or 0 to 2"),
    ],
)
def test_unusable_arguments(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_missing_candidate_cannot_be_chosen() -> None:
    choice = LayerChoice([Times(1), None], key="op")
    assert torch.equal(decided(choice, op=[True, False])(X), X)
    choice.bound_mutator.decide({"op": [False, True]})  # type: ignore[union-attr]
    with pytest.raises(SpaceError, match="candidate '1' is None and cannot be chosen"):
        choice(X)


# ----- InputChoice


def test_inputs_by_list_tuple_and_name() -> None:
    choice = decided(Sources(), choose=[True, False, True], a=[True], b=[True])
    for inputs in ([X, 2 * X, 4 * X], (X, 2 * X, 4 * X), {"": 4 * X, "b": 2 * X, "a": X}):
        assert torch.equal(choice(inputs), 5 * X)


class Sources(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = LayerChoice([Times(1)], key="a")
        self.b = LayerChoice([Times(1)], key="b")
        self.choose = InputChoice(choose_from=("a", "b", InputChoice.NO_KEY), key="choose")

    def forward(self, inputs: Any) -> Any:
        return self.choose(inputs)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ([X], ValueError, "'choose': got 1 inputs, expected 3"),
        ({"a": X, "b": X, "c": X}, ValueError, "inputs are named"),
        (X, TypeError, "expected a list or dict of inputs, got Tensor"),
    ],
)
def test_unusable_inputs(inputs: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        decided(Sources(), choose=[True, False, True], a=[True], b=[True])(inputs)


def test_chosen_inputs_may_be_none() -> None:
    choice = decided(InputChoice(n_candidates=2, key="op"), op=[True, True])
    assert torch.equal(choice([None, X]), X)
    assert choice([None, None]) is None


# ----- keys


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = LayerChoice([Times(1), Times(2)])
        self.named = LayerChoice([Times(1)], key="LayerChoice3")
        self.choose = InputChoice(choose_from=[self.first.key, ""])
        self.last = LayerChoice([self.inner(), Times(2)])

    def inner(self) -> nn.Module:
        return nn.Sequential(LayerChoice([Times(1)]))


def test_automatic_keys_belong_to_the_model() -> None:
    for _ in range(2):
        model = Two()
        assert list(choices(model)) == [
            "LayerChoice1",
            "LayerChoice3",
            "InputChoice2",
            "LayerChoice4",
            "LayerChoice5",
        ]
        assert model.choose.choose_from == ["LayerChoice1", ""]
        assert [c.name for c in all_choices(model)] == ["first", "named", "choose", "last", "last.0.0"]
    # read again, and as a part of something larger
    assert list(choices(model)) == list(choices(model))
    outer = nn.Sequential(LayerChoice([Times(1)]), model)
    assert list(choices(outer))[:2] == ["LayerChoice1", "LayerChoice2"]
    assert model.choose.choose_from == [model.first.key, ""]


def test_copies_have_decisions_of_their_own() -> None:
    block = LayerChoice([Times(1), Times(2)])
    model = nn.Sequential(block, copy.deepcopy(block), block)
    assert list(choices(model)) == ["LayerChoice1", "LayerChoice2"]


def test_a_key_that_is_no_string() -> None:
    with pytest.warns(UserWarning, match="key 3 of LayerChoice is not a string"):
        assert LayerChoice([Times(1)], key=3).key == "3"  # type: ignore[arg-type]


def test_keys_shared_by_unequal_choices() -> None:
    model = nn.ModuleList([LayerChoice([Times(1)], key="k"), LayerChoice([Times(1), Times(2)], key="k")])
    with pytest.raises(SpaceError, match="share the key 'k' differ: '0' has 1 candidates, '1' has 2"):
        Mutator(model)


def test_sources_must_come_earlier() -> None:
    model = nn.ModuleList([InputChoice(choose_from=["later"], key="i"), LayerChoice([Times(1)], key="later")])
    with pytest.raises(SpaceError, match="'later' required by 'i' not found in keys that appeared before"):
        Mutator(model)


# ----- copies, scopes, unbound


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(bound: bool, way: Any) -> None:
    model = nn.Sequential(layers(), Scope(), InputChoice(n_candidates=1, key="i"))
    if bound:
        decided(model, op=[False, True, False], i=[True], inner=[True])
    clone = way(model)
    assert [type(m) for m in clone.modules()] == [type(m) for m in model.modules()]
    assert not {id(p) for p in clone.parameters()} & {id(p) for p in model.parameters()}
    if bound:
        assert torch.equal(clone[0](X), 10 * X)
        with pytest.raises(RuntimeError, match=r"call its release\(\)"):
            Decided(clone)
    else:
        decided(clone, op=[True, False, False], i=[True], inner=[True])
        assert model[0].bound_mutator is None


class Scope(MutableScope):
    def __init__(self) -> None:
        super().__init__("scope")
        self.inner = LayerChoice([Times(2)], key="inner")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Listener(Decided):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.heard: list[str] = []

    def enter_mutable_scope(self, mutable_scope: MutableScope) -> None:
        self.heard.append(f"enter {mutable_scope.key}")

    def exit_mutable_scope(self, mutable_scope: MutableScope) -> None:
        self.heard.append(f"exit {mutable_scope.key}")


def test_scopes_are_heard_also_when_forward_fails() -> None:
    model = Scope()
    mutator = Listener(model)
    mutator.decide({"inner": [True]})
    model(X)
    with pytest.raises(TypeError):
        model()
    assert mutator.heard == ["enter scope", "exit scope"] * 2
    assert list(mutator.choices_by_key) == ["inner"]
    assert [mutable.key for mutable in mutator.mutables] == ["scope", "inner"]


@pytest.mark.parametrize("make", [layers, lambda: InputChoice(n_candidates=1, key="op"), Scope])
def test_unbound(make: Any) -> None:
    with pytest.raises(ValueError, match="Mutator not set for"):
        make()([X])


def test_a_mutable_defines_forward() -> None:
    with pytest.raises(NotImplementedError, match="Mutable must define forward"):
        Mutable()(X)
