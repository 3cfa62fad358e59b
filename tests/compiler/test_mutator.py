"""Binding, deciding, exporting: the mutator's part that knows no randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nascompile.base_mutator import BaseMutator
from nascompile.compiler.errors import ArchitectureError, SpaceError
from nascompile.compiler.mutator import SoftDecision, readable
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.mutator import Mutator
from tests.comparing import Decided


def space() -> nn.Module:
    return nn.ModuleList([
        LayerChoice([nn.Identity(), nn.ReLU()], key="a"),
        LayerChoice([nn.Identity(), nn.ReLU()], key="a"),
        InputChoice(n_candidates=2, key="b"),
    ])  # fmt: skip


class Fixed(Mutator):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.samples = 0

    def sample_search(self) -> dict[str, Any]:
        self.samples += 1
        return {"a": torch.tensor([True, False]), "b": torch.tensor([0.25, 0.75])}

    def sample_final(self) -> dict[str, Any]:
        return {"a": [False, True], "b": [0.0, 1.0]}


def test_reading_the_space() -> None:
    mutator = Decided(space())
    assert [m.name for m in mutator.undedup_mutables] == ["0", "1", "2"]
    assert [m.key for m in mutator.mutables] == ["a", "b"]
    assert [m.key for m in mutator.mutables.traverse(deduplicate=False, order="post")] == ["a", "a", "b"]
    with pytest.raises(ValueError, match="order is 'random', expected"):
        list(mutator.mutables.traverse(order="random"))


def test_a_decision_holds_until_the_next_reset() -> None:
    mutator = Fixed(space())
    assert mutator.decision == {}
    mutator.reset()
    assert mutator.samples == 1
    assert mutator.status() == {"a": [1.0, 0.0], "b": [0.25, 0.75]}
    mutator.reset()
    assert mutator.samples == 2


def test_export_is_what_people_read() -> None:
    assert Fixed(space()).export() == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("choice", "mask", "expected"),
    [
        (LayerChoice([nn.ReLU(), nn.ReLU()]), [False, True], 1),
        (LayerChoice({"x": nn.ReLU(), "y": nn.ReLU()}), [False, True], "y"),  # type: ignore[arg-type]
        (LayerChoice({"x": nn.ReLU(), "1": nn.ReLU()}), [1, 1], ["x", "1"]),  # type: ignore[arg-type]
        (LayerChoice([nn.ReLU(), nn.ReLU()]), [False, False], []),
        (LayerChoice([nn.ReLU(), nn.ReLU()]), torch.tensor([0.5, 0.5]), [0.5, 0.5]),
        (LayerChoice([nn.ReLU(), nn.ReLU()]), torch.tensor([0.0, 1.0]), 1),
        (InputChoice(choose_from=["a", "b"]), [True, True], ["a", "b"]),
        (InputChoice(choose_from=["a", "a"]), [True, False], 0),
        (InputChoice(n_candidates=1), [True], 0),
    ],
)
def test_readable(choice: Any, mask: Any, expected: Any) -> None:
    assert readable(choice, mask) == expected


def test_export_names_what_is_wrong() -> None:
    class Wrong(Fixed):
        def sample_final(self) -> dict[str, Any]:
            return {"a": [True], "b": [True, True]}

    with pytest.raises(SpaceError, match="choice 'a': mask has 1 entries, expected 2"):
        Wrong(space()).export()

    class Unknown(Fixed):
        def sample_final(self) -> dict[str, Any]:
            return {"c": [True]}

    with pytest.raises(ArchitectureError, match="unknown keys: c"):
        Unknown(space()).export()


def test_binding_twice_and_releasing() -> None:
    model = space()
    first = Decided(model)
    with pytest.raises(
        RuntimeError, match=r"already bound to a Decided; call its release\(\) before binding a Fixed"
    ):
        Fixed(model)
    assert model[0].bound_mutator is first  # type: ignore[union-attr]
    first.release()
    second = Fixed(model)
    assert model[0].bound_mutator is second  # type: ignore[union-attr]
    assert first.is_released
    second.set = 1
    assert not list(second.state_dict())


def test_nothing_is_bound_when_the_space_is_inconsistent() -> None:
    model = nn.ModuleList([LayerChoice([nn.ReLU()], key="a"), InputChoice(choose_from=["none"], key="i")])
    with pytest.raises(SpaceError):
        Decided(model)
    assert model[0].bound_mutator is None


def test_a_mutator_is_not_a_network() -> None:
    model = space()
    mutator = Decided(model)
    with pytest.raises(RuntimeError, match="has no forward"):
        mutator(torch.ones(1))
    with pytest.raises(AttributeError, match="cannot be replaced"):
        mutator.model = model
    assert list(mutator.modules()) == [mutator]


@pytest.mark.parametrize("method", ["sample_search", "sample_final"])
def test_what_a_subclass_has_to_define(method: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Decided must define {method}"):
        getattr(Decided(space()), method)()


def test_the_base_has_no_way_of_its_own() -> None:
    model = nn.Sequential(LayerChoice([nn.ReLU()], key="a"))
    mutator = BaseMutator(model)
    with pytest.raises(NotImplementedError, match="on_forward_layer_choice"):
        model(torch.ones(1))
    with pytest.raises(NotImplementedError, match="on_forward_input_choice"):
        mutator.on_forward_input_choice(InputChoice(1), [torch.ones(1)])
    with pytest.raises(NotImplementedError, match="export"):
        mutator.export()


def test_a_mask_changed_in_place_is_read_again() -> None:
    model = nn.Sequential(LayerChoice([nn.Identity(), nn.Tanh()], key="a"))
    mask = torch.tensor([1.0, 0.0])
    mutator = Decided(model)
    mutator.decide({"a": mask})
    x = torch.full((1,), 2.0)
    assert torch.equal(model(x), x)
    mask.copy_(torch.tensor([0.0, 1.0]))
    assert torch.equal(model(x), x.tanh())


def test_scopes_make_no_decision() -> None:
    class Scope(MutableScope):
        def forward(self, x: Any) -> Any:
            return x

    mutator = Decided(nn.Sequential(Scope("s"), LayerChoice([nn.ReLU()], key="a")))
    assert list(mutator.choices_by_key) == ["a"]


def test_a_soft_decision_is_not_read_on_a_gpu() -> None:
    """All candidates take part; on a CPU, where reading costs nothing, zeros are seen."""
    model = torch.nn.Sequential(LayerChoice([torch.nn.Identity(), torch.nn.ReLU()], key="op"))
    mutator = Mutator(model)
    for device, indices in (("cpu", (1,)), ("meta", (0, 1))):
        mask = torch.tensor([0.0, 1.0]).to(device)
        mutator.decide(SoftDecision({"op": mask}))
        assert mutator.selection("op", 2)[0].indices == indices


@pytest.mark.parametrize("change", [lambda d: d.update(op=d["op"] * 1), lambda d: d["op"].zero_()])
def test_a_soft_decision_that_is_changed_is_read(change: Any) -> None:
    mask = torch.ones(2, device="meta")
    decision = SoftDecision({"op": mask})
    assert decision.needs_no_reading("op")
    change(decision)
    assert not decision.needs_no_reading("op")
    assert not SoftDecision({"op": mask.bool()}).needs_no_reading("op")
