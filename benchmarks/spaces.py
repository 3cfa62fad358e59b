"""The suite of search spaces: a training step of the supernet, beside eager PyTorch and torch.compile.

Measured by `nascompile.runtime.bench`, as `nascompile bench` does. Choices of linear layers are the suite
linear_choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nascompile
from nascompile.mutables import LayerChoice
from nascompile.random import RandomMutator
from nascompile.runtime.bench import BenchSettings, bench, default_peers
from nascompile.runtime.bench_memory import give_back_memory
from nascompile.runtime.bench_peers import PEERS, Decision
from nascompile.runtime.bench_report import Report
from nascompile.runtime.bench_subject import Call, Recipe, Subject
from nascompile.runtime.bilevel import unrolled_gradient
from nascompile.spaces import DartsNetwork, MBConvNetwork, NASBench201Network, ShuffleNetSpace

CLASSES = 10
SAMPLES = 1000
"""Paths drawn to count what is compiled again when the decision changes."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: what it is, how the subject is made, how the choices are decided."""

    name: str
    case: str
    recipe: Recipe
    decision: str = "soft"


def subject(make: Callable[[], nn.Module], batch: int, size: int = 32, channels: int = 3) -> Subject:
    """A network, images and labels; the same in every process."""
    torch.manual_seed(0)
    model = make().train()
    labels = torch.arange(batch) % CLASSES

    def loss(output: Tensor) -> Tensor:
        return cross_entropy(output, labels.to(output.device))

    return Subject(model, (torch.randn(batch, channels, size, size),), loss)


def darts(batch: int, layers: int = 8, nodes: int = 4, channels: int = 16) -> Subject:
    """The supernet of DARTS on CIFAR-10 (Liu 2018, section 3.1)."""
    return subject(lambda: DartsNetwork(32, 3, channels, CLASSES, layers, n_nodes=nodes), batch)


def darts_second_order(batch: int, **smaller: int) -> Subject:
    """A step of the architecture in the second order, and one of the weights."""
    found = darts(batch, **smaller)
    found.step = UnrolledStep(found)
    return found


class UnrolledStep:
    """The second order of DARTS on two batches: gradients of architecture and weights."""

    def __init__(self, found: Subject) -> None:
        # those of the paper
        self._optimizer = torch.optim.SGD(found.model.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
        self._valid = torch.randn_like(found.inputs[0])
        self._buffers: list[Tensor] | None = None

    def __call__(self, found: Subject, call: Call, decision: Decision) -> None:
        (train,) = found.inputs
        if self._valid.stride() != train.stride() or self._valid.device != train.device:
            self._valid = torch.empty_like(train).copy_(self._valid)
        if self._buffers is None:
            self._buffers = list(found.model.buffers())

        def loss(x: Tensor) -> Tensor:
            decision.renew()
            return found.loss(call(x))

        alphas: list[Any] = list(decision.logits.values())
        gradients = unrolled_gradient(
            *(lambda: loss(train), lambda: loss(self._valid), self._optimizer, alphas),
            buffers=self._buffers,
        )
        loss(train).backward()
        for alpha, gradient in zip(alphas, gradients, strict=True):
            alpha.grad = gradient


def nasbench201(batch: int, cells: int = 5) -> Subject:
    """NAS-Bench-201 (Dong and Yang 2020)."""
    return subject(lambda: NASBench201Network(16, cells, CLASSES), batch)


def mbconv(batch: int) -> Subject:
    """The space of MBConv blocks, for CIFAR-10."""
    return subject(lambda: MBConvNetwork.cifar(CLASSES), batch)


def spos(batch: int, size: int = 64) -> Subject:
    """The space of Single Path One-Shot, on small images."""
    return subject(lambda: ShuffleNetSpace(n_classes=CLASSES, dropout_rate=0.0), batch, size)


def convolutions(batch: int, channels: int = 32, size: int = 32) -> Subject:
    """A choice of 3x3, 5x5 and 7x7, and a classifier."""

    def make() -> nn.Module:
        candidates = [nn.Conv2d(channels, channels, k, padding=k // 2) for k in (3, 5, 7)]
        head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
        return nn.Sequential(LayerChoice(candidates, key="conv"), *head)

    return subject(make, batch, size, channels)


CASES = {
    "darts16": Case("DARTS", "batch 16", partial(darts, 16)),
    "darts64": Case("DARTS", "batch 64", partial(darts, 64)),
    "darts16-second-order": Case("DARTS, second order", "batch 16", partial(darts_second_order, 16)),
    "nb201": Case("NAS-Bench-201", "batch 64", partial(nasbench201, 64)),
    "mbconv": Case("MBConv", "batch 16", partial(mbconv, 16)),
    "conv357": Case("conv 3, 5, 7", "C=32, 32x32, batch 32", partial(convolutions, 32)),
    "spos": Case("SPOS", "64x64, batch 16", partial(spos, 16), "sampled"),
    "gdas": Case("GDAS on DARTS", "batch 16", partial(darts, 16), "straight-through"),
}
# the same in seconds: whether everything works, not how fast it is
SMALL = {
    "darts16": Case("DARTS", "small", partial(darts, 2, 2, 2, 8)),
    "darts16-second-order": Case(
        "DARTS, second order", "small", partial(darts_second_order, 2, layers=2, nodes=2, channels=8)
    ),
    "nb201": Case("NAS-Bench-201", "small", partial(nasbench201, 4, 1)),
    "conv357": Case("conv 3, 5, 7", "small", partial(convolutions, 4, 8, 16)),
    "gdas": Case("GDAS on DARTS", "small", partial(darts, 2, 2, 2, 8), "straight-through"),
}


def rows(
    *,
    compiled: bool,
    names: Sequence[str] | None = None,
    small: bool = False,
    seconds: float = 10.0,
    limit: float = 900.0,
    threads: int | None = None,
    device: str = "cpu",
    samples: int = SAMPLES,
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case, one per peer; `ratio` is the fastest other peer's median over ours."""
    cases = SMALL if small else CASES
    for name in cases if names is None else names:
        case = cases[name]
        # other suites run in this process and keep theirs; the peers need it
        give_back_memory()
        settings = BenchSettings(
            decision=case.decision, seconds=seconds, limit=limit, threads=threads, device=device
        )
        peers = default_peers(settings, has_maps=True)
        wanted = tuple(peer for peer in peers if compiled or PEERS[peer].runner != "compile")
        settings = replace(settings, peers=wanted)
        report = bench(case.recipe, settings, say=lambda line, name=name: say(f"{name}: {line}"))
        runs = not any(row.failed for row in report.rows if row.is_ours)
        made = count_made(case.recipe, samples) if runs and samples and case.decision != "soft" else ""
        yield list(_rows(case, report, made))


def _rows(case: Case, report: Report, made: str) -> Iterator[dict[str, Any]]:
    for row in report.rows:
        yield {
            "suite": "spaces",
            "name": case.name,
            "case": case.case,
            "peer": row.peer,
            "median": row.median_ms,
            "p20": row.p20_ms,
            "p80": row.p80_ms,
            "ratio": report.speed(row) if row.is_ours else None,
            "wrong": "; ".join(report.wrong) if row.is_ours else "",
            "memory": row.memory_mib,
            "memory_ratio": report.memory_ratio(row) if row.is_ours else None,
            "arithmetic": report.arithmetic(row),
            "compiling": row.ready_s,
            "note": row.note or (made if row.is_ours else ""),
        }


def count_made(recipe: Recipe, samples: int, batch: int = 2) -> str:
    """Traces and plans that are made while `samples` random paths are trained, in words."""
    found = recipe()
    inputs = tuple(value[:batch] for value in found.inputs)
    mutator = RandomMutator(found.model)
    model = nascompile.compile(found.model)
    plans: dict[int, Any] = {}
    for _ in range(samples):
        mutator.reset()
        model(*inputs).sum().backward()
        for entry in model.entries:
            # held, so that no two of them get one id
            plans.update({id(plan): plan for region in entry.regions for plan in region.plans})
    reasons = [
        f"{region.__name__} {model.notes[region.__name__]}"
        for entry in model.entries
        for region in entry.regions
        if region.__name__ in model.notes
    ]
    made = f"{len(model.entries)} traces, {len(plans)} plans in {samples} sampled paths"
    return "; ".join([made, *reasons])
