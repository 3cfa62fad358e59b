"""What explain says: numbers worked out by hand, islands and notes of the compiler, JSON and tables."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from nascompile.compiler.compiled import compile
from nascompile.compiler.explain import Explanation, explain, human
from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.sizes import count_architectures


def linear(wide: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) if wide else nn.Linear(4, 4)


def layer(key: str, **more: nn.Module) -> LayerChoice:
    named: OrderedDict[str, Any] = OrderedDict(
        plain=linear(), wide=linear(wide=True), none=nn.Identity(), **more
    )
    return LayerChoice(named, key=key)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = layer("a"), layer("tied"), layer("tied")
        self.skip = InputChoice(choose_from=["a", "", ""], n_chosen=2, key="skip")
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.skip([x, self.b(x), self.c(x)]))


X = torch.ones(3, 4)


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return explain(Net(), X)


def shown(explanation: Explanation, width: int = 200) -> str:
    out = io.StringIO()
    explanation.render(Console(file=out, width=width))
    return out.getvalue()


def test_rows(explanation: Explanation):
    rows = {row.path: row for row in explanation.rows}
    assert list(rows) == ["a", "b", "c", "skip"]
    a = rows["a"]
    assert [(c.name, c.type, c.parameters, c.flops) for c in a.candidates] == [
        ("plain", "Linear", 20, 2 * 3 * 16),
        ("wide", "Sequential", 40 + 36, 2 * 3 * 64),
        ("none", "Identity", 0, 0),
    ]
    assert (a.parameters, a.flops) == (96, 2 * 3 * 80)
    assert (a.fed_by, a.feeds) == (("(input)",), ("b", "c", "skip"))
    assert rows["b"].shared_with == ("c",)
    assert rows["skip"].n_chosen == 2
    assert a.compiled == (
        "fused: mixed_sum; merged into one layer: plain, none; in no region: candidate 'plain': Linear: "
        "a linear layer of 4 numbers is not given one number a channel"
    )
    nothing = "fused: mixed_sum; in no region: no choice of layers is connected to it"
    assert rows["skip"].compiled == nothing


def test_sizes(explanation: Explanation):
    head = 4 * 2 + 2
    assert explanation.total.parameters == 3 * 96 + head
    assert explanation.total.flops == 3 * (2 * 3 * 80) + 2 * 3 * 8
    assert (explanation.largest.parameters, explanation.smallest.parameters) == (3 * 76 + head, head)
    assert (explanation.largest.flops, explanation.smallest.flops) == (3 * 2 * 3 * 64 + 48, 48)
    assert explanation.largest.flops_per_sample == explanation.largest.flops / 3
    # two keys of three candidates, two of three inputs
    assert explanation.architectures == 3 * 3 * 3


def test_sizes_with_nested_choices_and_shared_parameters():
    shared = nn.Linear(4, 4)
    inner = LayerChoice([shared, nn.Identity()], key="inner")
    model = nn.Sequential(
        shared, LayerChoice([nn.Sequential(inner, nn.Linear(4, 4)), linear(wide=True)], key="outer")
    )
    found = explain(model, X)
    # largest: the wide candidate (76) against the inner linear (already there) and one more (20)
    assert found.largest.parameters == 20 + 76
    assert found.smallest.parameters == 20 + 20
    assert found.largest.flops == 2 * 3 * (16 + 64)
    assert found.smallest.flops == 2 * 3 * (16 + 16)


def test_count_of_architectures():
    choices = [
        LayerChoice([nn.Identity(), None, nn.ReLU()], key="a"),
        InputChoice(n_candidates=4, key="b"),
        InputChoice(n_candidates=5, n_chosen=2, key="c"),
        InputChoice(n_candidates=5, n_chosen=2, key="c"),
    ]
    assert count_architectures(nn.ModuleList(choices)) == 2 * 2**4 * 10


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = layer("op")

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = x + 1
        return self.op(x)


def test_islands_are_named_with_file_line_and_reason():
    found = explain(nn.Sequential(Loop(), layer("last")), X)
    (island,) = found.islands
    assert island.path == "0"
    assert island.file.endswith("test_explain.py")
    assert island.line > 0
    text = shown(found)
    assert "1 part run as written" in text
    assert f"{island.line}" in text
    assert "1 part not traced" in str(found)
    assert {row.path: row.compiled for row in found.rows}["0.op"] == (
        "fused: mixed_sum, called from plain Python"
    )


def test_why_a_choice_is_not_fused():
    single = nn.Sequential(LayerChoice([nn.Linear(4, 4)], key="one"))
    assert (
        explain(single, X)
        .rows[0]
        .compiled.startswith(
            "traced, not fused: mixed_sum: there is only one candidate; in no region: candidate '0': Linear"
        )
    )

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dead = layer("dead")

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert explain(Dead(), X).rows[0].compiled == "never called"
    assert "never called" in shown(explain(Dead(), X))


def test_where_each_choice_is_computed_and_why():
    def relu(layer: nn.Module) -> nn.Module:
        return nn.Sequential(nn.ReLU(), layer)

    model = nn.Sequential(
        LayerChoice([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)], key="merged"),
        nn.Tanh(),
        LayerChoice([relu(nn.Conv2d(4, 4, 1)), relu(nn.GroupNorm(2, 4))], key="norm"),
        nn.ReflectionPad2d(1),
        LayerChoice([relu(nn.Conv2d(4, 4, 1)), nn.AvgPool2d(3, 1, 1)], key="planned"),
        LayerChoice(
            [nn.Sequential(nn.Linear(7, 7), act, nn.Linear(7, 7)) for act in (nn.ReLU(), nn.GELU())],
            key="batched",
        ),
    )
    found = {row.key: row.compiled for row in explain(model, torch.randn(2, 4, 5, 5)).rows}
    linear = "Linear: a linear layer of 7 numbers is not given one number a channel"
    assert found == {
        "merged": "fused: mixed_sum; merged into one layer: 0, 1",
        "norm": "fused: mixed_sum; in no region: candidate '1': GroupNorm is not understood by regions",
        "planned": "fused: region_0",
        "batched": f"fused: mixed_sum; computed together: 0, 1; in no region: candidate '0': {linear}",
    }


def test_a_given_compiled_model_is_reported():
    model = Net()
    compiled = compile(model, X, skip=["fuse_weighted_sums"])
    found = {row.compiled.split(";")[0] for row in explain(model, X, compiled=compiled).rows}
    assert found == {"traced"}
    assert explain(compiled, X) == explain(model, X, compiled=compiled)


def test_the_model_is_untouched():
    model = Net()
    assert explain(model, X).rows
    assert model.training

    class First(Mutator):
        def sample_search(self) -> dict[str, Any]:
            return {key: [True] + [False] * (len(c) - 1) for key, c in self.choices_by_key.items()}

        sample_final = sample_search

    mutator = First(model)
    mutator.reset()
    expected = model(X)
    explain(model, X)
    assert model.a.bound_mutator is mutator
    assert torch.equal(model(X), expected)


def test_json_holds_everything(explanation: Explanation):
    content = json.loads(explanation.to_json())
    assert content == explanation.to_dict()
    assert [row["path"] for row in content["rows"]] == ["a", "b", "c", "skip"]
    assert content["rows"][0]["candidates"][1]["output"] == [3, 4]
    assert content["total"]["parameters"] == explanation.total.parameters
    assert content["islands"] == []


def test_tables_hold_what_a_reader_asks_for(explanation: Explanation):
    text = shown(explanation)
    for words in (
        "wide",
        "76",
        "384",
        "3×4",
        "fused: mixed_sum",
        "2 of 3 inputs",
        "input 1",
        "and 1 more with this key",
    ):
        assert words in text, words
    assert "traced as a whole" in text
    assert str(explanation).startswith("4 choices under 3 keys, 27 architectures of 10 to 238 parameters")


def test_a_large_space_is_shown_as_ranges():
    blocks = [layer(f"[{i}]", extra=nn.Linear(4, 4, bias=False)) for i in range(20)]
    text = shown(explain(nn.Sequential(*blocks), X))
    assert "1 of 4 (A)" in text
    assert "0 to 76" in text
    assert "[7]" in text  # a key is not markup
    assert text.count("wide") == 1
    assert "1.0 × 10^12 architectures" in text


def test_unequal_candidates_are_announced():
    model = nn.Sequential(LayerChoice([nn.Linear(4, 2), nn.Linear(4, 3)], key="k"))
    found = explain(model, X)
    assert found.unequal == 'choice "k": candidate "1" returns (3, 3), "0" returns (3, 2)'
    assert "a weighted method cannot search this space" in shown(found)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 "),
        (999, "999 "),
        (1234, "1.23 k"),
        (999_600, "1 M"),
        (34_500_000, "34.5 M"),
        (1.2e9, "1.2 G"),
        (2.5, "2.5 "),
    ],
)
def test_human_units(number: float, text: str):
    assert human(number) == text
