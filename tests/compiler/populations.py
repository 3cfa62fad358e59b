"""What the tests of populations share: the definition, one architecture at a time, and small spaces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile import spaces
from nascompile.compiler.population import Population
from nascompile.compiler.space import choices
from nascompile.fixed import FixedArchitecture
from nascompile.mutables import LayerChoice
from nascompile.spaces.mbconv import CIFAR_STAGES
from tests.comparing import assert_same, replaced, tensors

Architecture = dict[str, Any]


def drawn(model: nn.Module, count: int, seed: int = 0) -> list[Architecture]:
    """Random architectures: one candidate of each choice, as many inputs as it takes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        architecture = {}
        for key, choice in choices(model).items():
            wanted = 1 if isinstance(choice, LayerChoice) else choice.n_chosen
            wanted = len(choice) if wanted is None else wanted
            architecture[key] = torch.randperm(len(choice), generator=generator)[:wanted].tolist()
        found.append(architecture)
    return found


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return replaced(args, [leaf.detach().clone() for leaf in tensors(args)])


def one_at_a_time(
    model: nn.Module, architectures: list[Architecture], *args: Any, **kwargs: Any
) -> list[Any]:
    """The definition: a copy of the model, decided for one architecture."""
    found = []
    for architecture in architectures:
        clone = copy.deepcopy(model)
        mutator = FixedArchitecture(clone, architecture)
        mutator.reset()
        found.append(clone(*fresh(args), **replaced(kwargs, [t.detach().clone() for t in tensors(kwargs)])))
        mutator.release()
    return found


def together(population: Population, *args: Any, **kwargs: Any) -> list[Any]:
    found = {
        position: replaced(output, [leaf.clone() for leaf in tensors(output)])
        for positions, output in population.outputs(*args, **kwargs)
        for position in positions
    }
    return [found[position] for position in range(len(found))]


@torch.no_grad()
def assert_exact(
    model: nn.Module, architectures: list[Architecture], *args: Any, apart: int = 0, memory: int = 2**30
) -> Population:
    """Equal to the definition, bit for bit, in two calls; `apart` architectures share nothing."""
    model.eval()
    before = copy.deepcopy(model.state_dict())
    untouched = fresh(args)
    expected = one_at_a_time(model, architectures, *args)
    population = Population(model, architectures, memory=memory, exact=True)
    for _ in range(2):
        assert_same(together(population, *args), expected, exact=True)
    assert_same(dict(model.state_dict()), dict(before), exact=True)
    assert_same(args, untouched, exact=True)
    assert len(population.apart) == apart, population.apart
    return population


class Chain(nn.Module):
    """Three choices one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()], key=name) for name in "abc"
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(self.c(self.b(x) + 1))


SPACES: dict[str, Callable[[], nn.Module]] = {
    "darts": lambda: spaces.DartsNetwork(16, 3, 4, 10, 3, 3),
    "nasbench201": lambda: spaces.NASBench201Network(4, 1),
    "mbconv": lambda: spaces.MBConvNetwork(10, stages=CIFAR_STAGES[:2], stem_stride=2),
    "enas": lambda: spaces.ENASMacroGeneralModel(num_layers=4, out_filters=8),
}
