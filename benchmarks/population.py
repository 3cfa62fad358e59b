"""The suite of populations: `nascompile.evaluate` against lean networks run one at a time.

The population is one of regularised evolution (Real et al. 2018, arXiv 1802.01548): random parents, then
children of the best of a sample with one or two decisions changed, the oldest leaving.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nascompile
from benchmarks.timing import summarise
from nascompile.compiler.space import choices
from nascompile.mutables import LayerChoice
from nascompile.spaces import DartsNetwork, MBConvNetwork, ShuffleNetSpace

Architecture = dict[str, Any]
# SMALL=1 in the environment: a version for trying out
SMALL = bool(os.environ.get("SMALL"))
MEMBERS, PARENTS, SAMPLE = (64, 16, 8) if not SMALL else (16, 6, 4)
BATCH, BATCHES = (64, 2) if not SMALL else (16, 6)
ROUNDS = 5 if not SMALL else 2


def spaces() -> dict[str, Callable[[], nn.Module]]:
    """The supernets by name."""
    cells, images = (8, 32) if not SMALL else (4, 16)
    return {
        "DARTS": lambda: DartsNetwork(images, 3, 16, 10, cells),
        "MBConv": MBConvNetwork.cifar,
        "ShuffleNet": lambda: ShuffleNetSpace(n_classes=10),
    }


def decide(choice: Any, numbers: random.Random) -> list[int]:
    """One layer, or as many inputs as the choice takes."""
    count = 1 if isinstance(choice, LayerChoice) else choice.n_chosen or 1
    return sorted(numbers.sample(range(len(choice)), count))


def evolved(model: nn.Module, numbers: random.Random) -> list[Architecture]:
    """The population after two generations of children; fitness is a random number of each architecture."""
    found = choices(model)
    fitness: dict[int, float] = {}
    pool: deque[Architecture] = deque(maxlen=MEMBERS)
    for _ in range(PARENTS):
        pool.append({key: decide(choice, numbers) for key, choice in found.items()})
    for _ in range(2 * MEMBERS):
        sample = numbers.sample(list(pool), min(SAMPLE, len(pool)))
        parent = max(sample, key=lambda one: fitness.setdefault(id(one), numbers.random()))
        child = dict(parent)
        for key in numbers.sample(sorted(found), numbers.choice((1, 2))):
            child[key] = decide(found[key], numbers)
        pool.append(child)
    return list(pool)


def mean(output: Tensor, target: Tensor) -> Tensor:
    """A metric that costs nothing and tells outputs apart."""
    return (output.double() * torch.sin(target.double())[:, None]).sum()


def one_at_a_time(networks: list[nn.Module], batches: list[Any]) -> list[float]:
    """Pruned networks, run eagerly without gradients."""
    found = []
    with torch.no_grad():
        for network in networks:
            values = [mean(network(x), y) * len(x) for x, y in batches]
            found.append(float(sum(values)) / sum(len(x) for x, _ in batches))
    return found


def rows(*, compiled: bool) -> Iterator[dict[str, Any]]:
    """One row per space and peer; `ratio` is the lean networks' time over that of `evaluate`.

    The time of pruning is not counted, that of tracing inside `evaluate` is. torch.compile is no peer,
    whatever `compiled` says: compiling 64 networks takes longer than running them.
    """
    for name, make in spaces().items():
        torch.manual_seed(0)
        model = make().eval()
        size = 16 if SMALL else 32
        batches = [(torch.randn(BATCH, 3, size, size), torch.arange(BATCH)) for _ in range(BATCHES)]
        population = evolved(model, random.Random(0))
        networks: list[nn.Module] = [nascompile.prune(model, one) for one in population]
        calls: dict[str, Callable[[], list[float]]] = {
            "nascompile.evaluate": lambda m=model, p=population, b=batches: nascompile.evaluate(
                m, p, b, mean
            ),
            "lean networks, one at a time": lambda n=networks, b=batches: one_at_a_time(n, b),
        }
        times: dict[str, list[float]] = {peer: [] for peer in calls}
        results: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for peer, call in calls.items():
                gc.collect()
                start = time.perf_counter()
                results[peer] = call()
                times[peer].append(1e3 * (time.perf_counter() - start))
        found, expected = results.values()
        close = torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        wrong = "" if close else f"{name}: evaluate gives other values than the lean networks"
        timings = {peer: summarise(values) for peer, values in times.items()}
        ours, theirs = timings.values()
        for peer, timing in timings.items():
            is_ours = peer.startswith("nascompile")
            yield {
                "suite": "population",
                "name": name,
                "case": f"{len(population)} architectures",
                "peer": peer,
                "median": timing.median,
                "p20": timing.p20,
                "p80": timing.p80,
                "ratio": theirs.median / ours.median if is_ours and not wrong else None,
                "wrong": wrong if is_ours else "",
            }
