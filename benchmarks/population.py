"""The suite of populations: `nascompile.evaluate` against architectures run one at a time.

The population is one of regularised evolution (Real et al. 2018, arXiv 1802.01548): random parents, then
children of the best of a sample with one or two decisions changed, the oldest leaving.
"""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nascompile
from benchmarks.timing import summarise
from nascompile.compiler.population import Population
from nascompile.compiler.space import choices
from nascompile.fixed import FixedArchitecture
from nascompile.mutables import LayerChoice
from nascompile.spaces import DartsNetwork, MBConvNetwork, ShuffleNetSpace

Architecture = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the population, of the sample that a parent is the best of, of the data and of DARTS."""

    members: int
    parents: int
    sample: int
    batch: int
    image: int
    cells: int
    rounds: int
    batches: int = 2


FULL = Size(members=64, parents=16, sample=8, batch=32, image=32, cells=8, rounds=5)
# the same in seconds: whether everything works, not how fast it is
SMALL = Size(members=6, parents=3, sample=2, batch=4, image=16, cells=2, rounds=2)

SPACES: dict[str, tuple[str, Callable[[Size], nn.Module]]] = {
    "darts": ("DARTS", lambda size: DartsNetwork(size.image, 3, 16, 10, size.cells)),
    "mbconv": ("MBConv", lambda size: MBConvNetwork.cifar()),
    "shufflenet": ("ShuffleNet", lambda size: ShuffleNetSpace(n_classes=10)),
}
"""For each row its name in the table, and the supernet."""


def decide(choice: Any, numbers: random.Random) -> list[int]:
    """One layer, or as many inputs as the choice takes."""
    count = 1 if isinstance(choice, LayerChoice) else choice.n_chosen or 1
    return sorted(numbers.sample(range(len(choice)), count))


def evolved(model: nn.Module, size: Size, numbers: random.Random) -> list[Architecture]:
    """The population after two generations of children; fitness is a random number of each architecture."""
    found = choices(model)
    fitness: dict[int, float] = {}
    pool: deque[Architecture] = deque(maxlen=size.members)
    for _ in range(size.parents):
        pool.append({key: decide(choice, numbers) for key, choice in found.items()})
    for _ in range(2 * size.members):
        sample = numbers.sample(list(pool), min(size.sample, len(pool)))
        parent = max(sample, key=lambda one: fitness.setdefault(id(one), numbers.random()))
        child = dict(parent)
        for key in numbers.sample(sorted(found), numbers.choice((1, 2))):
            child[key] = decide(found[key], numbers)
        pool.append(child)
    return list(pool)


@torch.no_grad()
def take_statistics(model: nn.Module, population: list[Architecture], image: int) -> None:
    """Running statistics of these architectures: with those of a new model activations fade, outputs are all
    the same, and denormal numbers are slow."""
    momentum = {module: module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    for norm in momentum:
        norm.momentum = 0.5
    model.train()
    for architecture in population:
        mutator = FixedArchitecture(model, architecture)
        mutator.reset()
        model(torch.randn(4, 3, image, image))
        mutator.release()
    model.eval()
    for norm, before in momentum.items():
        norm.momentum = before


def mean(output: Tensor, target: Tensor) -> Tensor:
    """A metric that costs nothing and tells outputs apart."""
    return (output.double() * torch.sin(target.double())[:, None]).sum()


def average(network: nn.Module, batches: list[Any]) -> float:
    """The mean of the metric."""
    values = [mean(network(x), y) * len(x) for x, y in batches]
    return float(sum(values)) / sum(len(x) for x, _ in batches)


@torch.no_grad()
def lean(networks: list[nn.Module], batches: list[Any]) -> list[float]:
    """Pruned networks, run eagerly."""
    return [average(network, batches) for network in networks]


@torch.no_grad()
def compiled_alone(network: nn.Module, population: list[Architecture], batches: list[Any]) -> list[float]:
    """The compiled supernet, decided for one architecture after the other."""
    found = []
    for architecture in population:
        mutator = FixedArchitecture(network, architecture)
        mutator.reset()
        found.append(average(network, batches))
        mutator.release()
    return found


@torch.no_grad()
def counted(
    model: nn.Module, population: list[Architecture], networks: list[nn.Module], image: Tensor
) -> float:
    """How many times more arithmetic one at a time is: what sharing alone could gain."""
    together = Population(model, population, exact=True)
    list(together.outputs(image))
    with FlopCounterMode(display=False) as shared:
        list(together.outputs(image))
    with FlopCounterMode(display=False) as alone:
        for network in networks:
            network(image)
    return alone.get_total_flops() / shared.get_total_flops()


def wrong(name: str, found: list[float], expected: list[float]) -> str:
    """What is wrong with results, in words."""
    close = torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    return "" if close else f"{name}: other values than the lean networks"


def rows(
    *, compiled: bool, names: Sequence[str] | None = None, small: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each space, one per peer; `ratio` is the time of the fastest other over that of `evaluate`.

    The times of pruning, and of compiling the supernet, are not counted; those of tracing and planning inside
    `evaluate` are. torch.compile is no peer, whatever `compiled` says: compiling 64 networks takes longer
    than running them.
    """
    for name in SPACES if names is None else names:
        yield list(compare(name, SMALL if small else FULL))


def compare(name: str, size: Size) -> Iterator[dict[str, Any]]:
    """The rows of one space: correctness first, then times taken in turn."""
    torch.manual_seed(0)
    title, make = SPACES[name]
    model = make(size)
    population = evolved(model, size, random.Random(0))
    take_statistics(model, population, size.image)
    shape = size.batch, 3, size.image, size.image
    batches = [(torch.randn(shape), torch.arange(size.batch)) for _ in range(size.batches)]
    networks: list[nn.Module] = [nascompile.prune(model, one) for one in population]
    network = nascompile.compile(model)
    calls: dict[str, Callable[[], list[float]]] = {
        "nascompile.evaluate": lambda: nascompile.evaluate(model, population, batches, mean),
        "nascompile.evaluate, exact": lambda: nascompile.evaluate(
            model, population, batches, mean, exact=True
        ),
        "compiled supernet, one at a time": lambda: compiled_alone(network, population, batches),
        "lean networks, one at a time": lambda: lean(networks, batches),
    }
    results = {peer: call() for peer, call in calls.items()}
    expected = results["lean networks, one at a time"]
    problems = {peer: wrong(peer, found, expected) for peer, found in results.items()}
    limit = counted(model, population, networks, torch.randn(1, *shape[1:]))
    times: dict[str, list[float]] = {peer: [] for peer in calls}
    for _ in range(size.rounds):
        for peer, call in calls.items():
            gc.collect()
            start = time.perf_counter()
            call()
            times[peer].append(1e3 * (time.perf_counter() - start))
    timings = {peer: summarise(values) for peer, values in times.items()}
    alone = min(timing.median for peer, timing in timings.items() if peer.endswith("one at a time"))
    for peer, timing in timings.items():
        is_ours = peer.startswith("nascompile.evaluate")
        yield {
            "suite": "population",
            "name": title,
            "case": f"{len(population)} architectures",
            "peer": peer,
            "median": timing.median,
            "p20": timing.p20,
            "p80": timing.p80,
            "ratio": alone / timing.median if is_ours and not problems[peer] else None,
            "wrong": problems[peer],
            "note": f"sharing saves {limit:.2f}x the arithmetic" if is_ours else "",
        }
