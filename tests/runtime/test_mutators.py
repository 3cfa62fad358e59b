"""RandomMutator, DartsMutator and the standalone architecture."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile import NascompileError
from nascompile.classic_nas import get_and_apply_next_architecture
from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.darts import DartsMutator
from nascompile.random import RandomMutator
from tests.runtime.toys import Net


class Space(nn.Module):
    """Choices to decide on; `forward` is never called."""

    def __init__(self, **choices: nn.Module) -> None:
        super().__init__()
        for name, choice in choices.items():
            self.add_module(name, choice)


def ops(*names: str, key: str) -> LayerChoice:
    return LayerChoice(OrderedDict((name, nn.Identity()) for name in names), key=key)


def set_alphas(mutator: DartsMutator, **values: Sequence[float]) -> None:
    with torch.no_grad():
        for key, value in values.items():
            mutator.choices[key].copy_(torch.tensor(value))


def frequencies(mutator: RandomMutator, draws: int) -> dict[str, Tensor]:
    samples = [mutator.sample_search() for _ in range(draws)]
    return {key: torch.stack([sample[key] for sample in samples]).double().mean(0) for key in samples[0]}


def test_random_is_uniform() -> None:
    space = Space(
        op=ops("a", "b", "c", key="op"),
        free=InputChoice(n_candidates=3, key="free"),
        two=InputChoice(n_candidates=4, n_chosen=2, key="two"),
        none=InputChoice(n_candidates=2, n_chosen=0, key="none"),
    )
    mutator = RandomMutator(space)
    measured = frequencies(mutator, 2000)
    for key, share in {"op": 1 / 3, "free": 0.5, "two": 0.5, "none": 0.0}.items():
        assert measured[key].tolist() == pytest.approx([share] * len(measured[key]), abs=0.05)
    for _ in range(50):
        masks = mutator.sample_search()
        assert int(masks["op"].sum()) == 1
        assert int(masks["two"].sum()) == 2


def test_random_follows_torchs_seed() -> None:
    mutator = RandomMutator(Net())
    torch.manual_seed(7)
    first = [mutator.export() for _ in range(5)]
    torch.manual_seed(7)
    assert [mutator.export() for _ in range(5)] == first
    assert len({json.dumps(sample) for sample in first}) > 1


def test_darts_search_weights_leave_a_share_for_no_output() -> None:
    mutator = DartsMutator(
        Space(op=ops("a", "b", key="op"), pick=InputChoice(n_candidates=2, n_chosen=1, key="pick"))
    )
    assert mutator.choices["op"].shape == (3,)
    assert mutator.choices["op"].dtype == torch.float32
    set_alphas(mutator, op=[0.0, 1.0, 2.0])
    mutator.reset()
    weights = mutator.decision["op"]
    e = torch.tensor([0.0, 1.0, 2.0]).exp()
    torch.testing.assert_close(weights, (e / e.sum())[:2])
    assert weights.requires_grad
    assert mutator.decision["pick"].tolist() == [True, True]


def test_darts_keys_may_contain_anything() -> None:
    space = Space(
        a=ops("x", "y", key="cell.0.op"), b=ops("x", "y", key="cell%2E0.op"), c=ops("x", "y", key="keys")
    )
    mutator = DartsMutator(space)
    assert mutator.choices.keys() == ["cell.0.op", "cell%2E0.op", "keys"]
    set_alphas(mutator, **{"cell.0.op": [0, 1, 0], "cell%2E0.op": [1, 0, 0], "keys": [0, 1, 0]})
    assert mutator.export() == {"cell.0.op": "y", "cell%2E0.op": "x", "keys": "y"}
    other = DartsMutator(
        Space(
            a=ops("x", "y", key="cell.0.op"), b=ops("x", "y", key="cell%2E0.op"), c=ops("x", "y", key="keys")
        )
    )
    other.load_state_dict(mutator.state_dict())
    assert other.export() == mutator.export()
    with pytest.raises(KeyError, match=r"cell\.9"):
        mutator.choices["cell.9"]


def darts_cell(*, other_keeps: str | None = None) -> Space:
    edges = {f"e{i}": ops("none", "skip", "conv", key=f"e{i}") for i in range(4)}
    node = InputChoice(choose_from=["e0", "e1", "e2", "e3"], n_chosen=2, key="node")
    second = (
        {}
        if other_keeps is None
        else {"other": InputChoice(choose_from=[other_keeps], n_chosen=1, key="other")}
    )
    return Space(**edges, node=node, **second)


def test_darts_derives_the_known_genotype() -> None:
    """Worked out by hand: e2's strongest is none, its best real op is weak, so e0 and e3 are kept."""
    mutator = DartsMutator(darts_cell())
    set_alphas(
        mutator,
        e0=[0.0, 2.0, 1.0, 0.0],
        e1=[0.0, 0.5, 0.6, 0.0],
        e2=[9.0, 1.0, 2.0, 0.0],
        e3=[0.0, 0.0, 3.0, 0.0],
    )
    assert mutator.export() == {"e0": "skip", "e1": [], "e2": [], "e3": "conv", "node": ["e0", "e3"]}


def test_darts_keeps_a_source_that_another_input_choice_keeps() -> None:
    mutator = DartsMutator(darts_cell(other_keeps="e1"))
    set_alphas(mutator, e0=[0, 2.0, 1, 0], e1=[0, 0.5, 0.6, 0], e2=[0, 0, 0.1, 0], e3=[0, 0, 3.0, 0])
    exported = mutator.export()
    assert exported["e1"] == "conv"
    assert exported["e2"] == []
    assert exported["other"] == "e1"


def test_darts_last_slot_and_empty_candidates_are_never_derived() -> None:
    space = Space(a=ops("conv", "skip", key="a"), b=ops("zero", "conv", key="b"), c=ops("none", key="c"))
    mutator = DartsMutator(space)
    set_alphas(mutator, a=[1.0, 0.0, 8.0], b=[5.0, 0.0, 0.0], c=[0.0, 0.0])
    # a choice of nothing but "none" has to take it
    assert mutator.export() == {"a": "conv", "b": "conv", "c": "none"}


def test_darts_any_number_of_inputs_means_all(caplog: pytest.LogCaptureFixture) -> None:
    space = Space(op=ops("a", "b", key="op"), some=InputChoice(n_candidates=3, key="some"))
    assert DartsMutator(space).sample_final()["some"].tolist() == [True] * 3
    assert not caplog.records


def test_darts_says_which_inputs_it_cannot_rank(caplog: pytest.LogCaptureFixture) -> None:
    space = Space(
        op=ops("a", "b", key="op"), some=InputChoice(choose_from=["op", ""], n_chosen=1, key="some")
    )
    mutator = DartsMutator(space)
    assert "'some': inputs [1] do not name a LayerChoice" in caplog.text
    assert mutator.export()["some"] == 0


def test_standalone_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NNI_GEN_SEARCH_SPACE", raising=False)
    monkeypatch.delenv("NNI_PLATFORM", raising=False)
    space = Space(
        op=ops("a", "b", key="op"),
        free=InputChoice(n_candidates=3, key="free"),
        two=InputChoice(n_candidates=4, n_chosen=2, key="two"),
    )
    get_and_apply_next_architecture(space)
    op: Any = space.op
    mutator = op.bound_mutator
    assert mutator.export() == {"op": "a", "free": 0, "two": [0, 1]}
    assert mutator.decision["free"].tolist() == [True, False, False]


def test_search_space_is_dumped_and_the_process_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "space.json"
    monkeypatch.setenv("NNI_GEN_SEARCH_SPACE", str(file))
    space = Space(op=ops("a", "b", key="op"), two=InputChoice(n_candidates=2, n_chosen=1, key="two"))
    with pytest.raises(SystemExit) as exit_:
        get_and_apply_next_architecture(space)
    assert exit_.value.code == 0
    assert json.loads(file.read_text()) == {
        "op": {"_type": "layer_choice", "_value": ["a", "b"]},
        "two": {"_type": "input_choice", "_value": {"candidates": ["", ""], "n_chosen": 1}},
    }
    monkeypatch.setenv("NNI_GEN_SEARCH_SPACE", str(file / "below"))
    with pytest.raises(NascompileError, match=r"cannot be written to .*below"):
        get_and_apply_next_architecture(space)


def test_tuner_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NNI_GEN_SEARCH_SPACE", raising=False)
    monkeypatch.setenv("NNI_PLATFORM", "local")
    model = Net()
    with pytest.raises(NascompileError, match="NNI_PLATFORM is 'local'"):
        get_and_apply_next_architecture(model)
    assert model.first.bound_mutator is None
