"""What every space owes: random decisions run and train, deep copies and pickles compute the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nascompile import search_space_zoo, spaces
from nascompile.spaces import (
    DartsNetwork,
    ENASMacroGeneralModel,
    ENASMicroNetwork,
    MBConvNetwork,
    NASBench201Network,
    ShuffleNetSpace,
)
from nascompile.spaces.mbconv import Stage
from tests.spaces.eager import RandomDecisions

SPACES: dict[str, Callable[[], nn.Module]] = {
    "darts": lambda: DartsNetwork(32, 3, 4, 10, n_layers=3, n_nodes=2),
    "enas_macro": lambda: ENASMacroGeneralModel(num_layers=4, out_filters=4),
    "enas_micro": lambda: ENASMicroNetwork(3, 4, 10, n_layers=3, n_nodes=3),
    "nasbench201": lambda: NASBench201Network(channels=4, n_cells=1),
    "mbconv": lambda: MBConvNetwork(10, stages=[Stage(8, 2, 2), Stage(12, 2, 1)], stem_stride=1),
    "shuffle": lambda: ShuffleNetSpace(10, stage_channels=(32, 64), stage_blocks=(2, 2), last_channels=32),
}


@pytest.fixture(params=SPACES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return SPACES[request.param]()


def test_random_decisions_run_and_train(model: nn.Module) -> None:
    mutator = RandomDecisions(model)
    for _ in range(5):
        mutator.reset()
        model.zero_grad(set_to_none=True)
        logits = model(torch.randn(3, 3, 32, 32))
        assert logits.shape == (3, 10)
        nn.functional.cross_entropy(logits, torch.tensor([1, 2, 3])).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_every_parameter_is_reached_by_some_decision(model: nn.Module) -> None:
    mutator = RandomDecisions(model)
    expected = {name for name, _ in model.named_parameters()}
    reached: set[str] = set()
    # the rarest parameter has a chance of 1 in 11: 400 draws miss it once in 10^16
    for _ in range(400):
        mutator.reset()
        model.zero_grad(set_to_none=True)
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None}
        if reached == expected:
            break
    assert reached == expected


def test_deep_copy_computes_the_same_with_its_own_parameters(model: nn.Module) -> None:
    RandomDecisions(model).reset()
    model.eval()
    clone = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), clone(x))
    assert list(model.state_dict()) == list(clone.state_dict())
    own, copied = ({id(p) for p in m.parameters()} for m in (model, clone))
    assert not own & copied


def test_pickle_before_binding(model: nn.Module) -> None:
    model.eval()
    # ours, made two lines up
    clone = pickle.loads(pickle.dumps(model))
    mutator, cloned = RandomDecisions(model), RandomDecisions(clone)
    mutator.reset()
    cloned.decide(mutator.decision)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), clone(x))


def test_keys_do_not_depend_on_earlier_models() -> None:
    for make in SPACES.values():
        first, second = (list(RandomDecisions(make()).choices_by_key) for _ in range(2))
        assert first == second


def test_public_names_exist() -> None:
    for module in (spaces, search_space_zoo):
        assert all(hasattr(module, name) for name in module.__all__)
    assert search_space_zoo.DartsCell is spaces.DartsCell
