"""Architecture files: read, validated as a whole, applied; and the search space as NNI writes it."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.architecture import format_architecture, load_architecture, masks_as_tensors, resolve
from nascompile.compiler.errors import ArchitectureError
from nascompile.fixed import FixedArchitecture, apply_fixed_architecture
from nascompile.mutables import InputChoice, LayerChoice, MutableScope


class Space(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice(
            OrderedDict(small=nn.Linear(3, 3), large=nn.Linear(3, 3), none=nn.Identity()), key="op"
        )
        self.list = LayerChoice([nn.Linear(3, 3), nn.Identity()], key="list")
        self.choose = InputChoice(choose_from=["op", "list", ""], n_chosen=1, key="choose")

    def forward(self, x: Tensor) -> Any:
        return self.choose([self.op(x), self.list(x), x])


GOOD = {"op": "small", "list": 0, "choose": "op"}


@pytest.mark.parametrize(
    ("key", "value", "mask"),
    [
        ("op", "large", [False, True, False]),
        ("op", 2, [False, False, True]),
        ("op", ["small", "none"], [True, False, True]),
        ("op", [0, 1], [True, True, False]),
        ("op", (2,), [False, False, True]),
        ("op", [True, False, True], [True, False, True]),
        ("op", [], [False, False, False]),
        ("op", [0.5, 0.0, 0.25], [0.5, 0.0, 0.25]),
        ("op", torch.tensor([True, False, True]), [True, False, True]),
        ("op", numpy.array([0.5, 0.0, 0.25]), [0.5, 0.0, 0.25]),
        ("list", "1", [False, True]),
        ("choose", "", [False, False, True]),
        ("choose", ["op", 1], [True, True, False]),
    ],
)
def test_values(key: str, value: Any, mask: list[Any]) -> None:
    assert resolve(Space(), {**GOOD, key: value})[key] == mask


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "key 'op': index 3 is out of range, expected 0 to 2"),
        (-1, "index -1 is out of range"),
        ("huge", "'huge' is not a candidate; candidates: 'small', 'large', 'none'"),
        (True, "True is a bool; expected a name, an index"),
        (None, "None is a NoneType"),
        (0.5, "0.5 is a float"),
        ({"small": 1}, "is a dict"),
        ([True, False], r"\[True, False\] has 2 entries, expected one for each of 3 candidates"),
        ([0.5, 0.5], "has 2 entries"),
        ([0, 1, 0], "names candidate 0 more than once"),
        ([0, 7], "index 7 is out of range"),
        ([0.5, float("nan"), 0.1], "weights that are not finite"),
        ([True, 1, 0], "True is a bool"),
    ],
)
def test_bad_values(value: Any, words: str) -> None:
    with pytest.raises(ArchitectureError, match=words):
        resolve(Space(), {**GOOD, "op": value})


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_touched() -> None:
    model = Space()
    before = copy.deepcopy(model)
    with pytest.raises(ArchitectureError) as error:
        apply_fixed_architecture(model, {"op": "huge", "list": 5, "extra": 1})
    for words in ("Missing keys in fixed architecture: choose", "extra", "'huge'", "index 5"):
        assert words in str(error.value)
    assert model.op.bound_mutator is None
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_names_of_several_inputs() -> None:
    model = InputChoice(n_candidates=2, key="i")
    with pytest.raises(ArchitectureError, match="'' names several inputs"):
        resolve(model, {"i": ""})


def test_strict() -> None:
    with pytest.raises(ArchitectureError, match="Unexpected keys found in fixed architecture: more"):
        FixedArchitecture(Space(), {**GOOD, "more": 1})
    mutator = FixedArchitecture(Space(), {**GOOD, "more": 1}, strict=False)
    mutator.reset()
    assert set(mutator.decision) == set(GOOD)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "arc.json"
    path.write_text(json.dumps(GOOD))
    assert load_architecture(path) == GOOD == load_architecture(str(path))
    path.write_text("[1]")
    with pytest.raises(ArchitectureError, match="holds a list, expected an object of keys"):
        load_architecture(path)
    path.write_text("{")
    with pytest.raises(ArchitectureError, match="is not valid JSON"):
        load_architecture(path)
    with pytest.raises(ArchitectureError, match="cannot be read: No such file"):
        load_architecture(tmp_path / "missing.json")


def test_exports_fit_every_instance_of_the_class() -> None:
    exported = FixedArchitecture(Space(), GOOD)
    exported.reset()
    again = json.loads(json.dumps(exported.export()))
    assert again == {"op": "small", "list": 0, "choose": 0}
    assert resolve(Space(), again) == resolve(Space(), GOOD)


# ----- applying


def test_apply_replaces_layers_everywhere() -> None:
    shared = LayerChoice([nn.Linear(3, 3), nn.Identity()], key="shared")
    nested = nn.Sequential(LayerChoice([nn.Tanh(), nn.ReLU()], key="inner"))
    middle = LayerChoice([nested, nn.Identity()], key="middle")
    model = nn.ModuleDict({
        "once": shared,
        "again": nn.Sequential(shared, nn.ReLU()),
        "nested": LayerChoice([nn.Identity(), middle], key="outer"),
    })  # fmt: skip
    linear = shared[0]
    apply_fixed_architecture(model, {"shared": 0, "outer": 1, "middle": 0, "inner": 1})
    assert model["once"] is linear
    assert model["again"][0] is linear  # type: ignore[index]
    assert isinstance(model["nested"][0], nn.ReLU)  # type: ignore[index]
    assert not any(isinstance(module, LayerChoice) for module in model.modules())
    assert list(model.state_dict())[:2] == ["once.weight", "once.bias"]


def test_apply_keeps_what_is_needed() -> None:
    model = nn.ModuleList([
        LayerChoice([nn.Linear(3, 3), nn.Identity()], key="mask", return_mask=True),
        LayerChoice([nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 3)], key="several"),
        LayerChoice([nn.Linear(3, 3), nn.Identity()], key="weights"),
    ])  # fmt: skip
    before = copy.deepcopy(model)
    architecture = {"mask": 1, "several": [0, 1], "weights": [0.5, 0.5]}
    apply_fixed_architecture(model, architecture)
    oracle = FixedArchitecture(before, architecture)
    oracle.reset()
    x = torch.ones(2, 3)
    for fixed, whole in zip(model, before, strict=True):
        torch.testing.assert_close(fixed(x), whole(x), rtol=0, atol=0)
    assert sum(p.numel() for p in model.parameters()) == 12 * 2


def test_apply_goes_through_a_compiled_model() -> None:
    model = Space()
    compiled = nascompile.compile(model, torch.ones(2, 3))
    apply_fixed_architecture(compiled, GOOD)
    assert isinstance(model.op, nn.Linear)
    torch.testing.assert_close(compiled(torch.ones(2, 3)), model.op(torch.ones(2, 3)), rtol=0, atol=0)


# ----- the space


def test_search_space_as_nni_writes_it() -> None:
    class Scoped(MutableScope):
        def __init__(self) -> None:
            super().__init__("scope")
            self.space = Space()

    assert nascompile.search_space(Scoped()) == {
        "op": {"_type": "layer_choice", "_value": ["small", "large", "none"]},
        "list": {"_type": "layer_choice", "_value": ["0", "1"]},
        "choose": {"_type": "input_choice", "_value": {"candidates": ["op", "list", ""], "n_chosen": 1}},
    }


def test_in_words() -> None:
    masks = resolve(Space(), {"op": [], "list": [0, 1], "choose": ""})
    assert format_architecture(Space(), masks) == "op: nothing\nlist: 0, 1\nchoose: 2"
    assert masks_as_tensors({"op": [True, False], "x": [0.5, 0.5]})["x"].dtype == torch.float32
