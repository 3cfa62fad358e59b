"""Benchmarks one subject: a process for every peer, correctness first, then steps of all peers in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.measure import count
from nascompile.runtime.bench_compare import (
    Error,
    Values,
    cloned,
    errors,
    exact_values,
    is_random,
    move_by_one_rounding,
    put_back,
    quiet_dropout,
    values,
)
from nascompile.runtime.bench_peers import PEERS, Decision, arranged, build_call, find_peer
from nascompile.runtime.bench_report import Report, Row, machine
from nascompile.runtime.bench_subject import Recipe, Subject
from nascompile.runtime.bench_worker import Worker, WorkerFailed

ROUNDS = 10
"""How often every peer has its turn."""

# forward, gradients of the inputs, gradients of the weights: each costs what the forward costs
PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """How to measure. `seconds` are those of one peer's timed steps, `limit` those it may take to compile."""

    decision: str = "soft"
    peers: tuple[str, ...] = ()
    seconds: float = 5.0
    limit: float = 120.0
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.peers:
            find_peer(name)
        for name, value in (("seconds", self.seconds), ("compile-limit", self.limit)):
            if not 0 < value < float("inf"):
                raise NascompileError(f"{name} is {value:g}, expected a positive number")
        if self.threads is not None and self.threads < 1:
            raise NascompileError(f"threads is {self.threads}, expected at least 1")
        if self.seed < 0:
            raise NascompileError(f"seed is {self.seed}, expected at least 0")


def default_peers(subject: Subject, settings: BenchSettings) -> tuple[str, ...]:
    """Eager in both layouts, torch.compile, ours; for a sampled path, that path as a network too."""
    has_maps = any(isinstance(v, torch.Tensor) and v.dim() == 4 for v in subject.inputs)
    return (
        "eager",
        *(["eager-channels-last"] if has_maps else []),
        *(["single-path"] if settings.decision != "soft" else []),
        "torch.compile",
        *(["torch.compile-max-autotune"] if settings.device.startswith("cuda") else []),
        "nascompile",
    )


def bench(
    recipe: Recipe,
    settings: BenchSettings,
    *,
    say: Callable[[str], object] = lambda line: None,
    title: str = "",
) -> Report:
    """Compare the peers on one subject. `say` is told what is being done.

    Raises whatever the recipe raises, and NascompileError for a model that cannot be compared. A peer that
    fails is a row that says why.
    """
    reference = _Reference(recipe, settings, say)
    names = settings.peers or default_peers(reference.subject, settings)
    rate = matmul_rate(settings)
    workers: dict[str, Worker] = {}
    rows: dict[str, Row] = {name: Row(peer=name) for name in names}
    common: dict[str, Any] = {
        "kind": settings.decision,
        "seed": settings.seed,
        "threads": settings.threads,
        "device": settings.device,
    }
    found: list[Error] = []
    with tempfile.TemporaryDirectory(prefix="nascompile-bench-") as folder:
        try:
            for name in names:
                say(f"{name}: compiling")
                row = rows[name]
                try:
                    workers[name] = worker = Worker(recipe, name, folder=Path(folder), **common)
                    row.ready_s = worker.ask("prepare", limit=settings.limit)
                    peak = worker.ask("memory")
                    row.memory_mib = None if peak is None else peak / 2**20
                    say(f"{name}: comparing")
                    problems = _compare(reference, recipe, worker, Path(folder), common, settings)
                    if PEERS[name].is_ours:
                        found += problems
                    wrong = [str(error) for error in problems if error.is_wrong]
                    row.note = f"wrong {wrong[0]}" if wrong else ""
                except WorkerFailed as reason:
                    row.note = str(reason)
                    row.failed = True
                    workers.pop(name, None)
            _take_turns(workers, rows, settings, say)
        finally:
            for worker in workers.values():
                worker.close()
    return Report(
        title=title,
        rows=list(rows.values()),
        errors=found,
        flops=None if reference.flops is None else PASSES * reference.flops,
        matmul_rate=rate,
        machine=machine(settings),
        decision=settings.decision,
        notes=reference.notes,
    )


def _take_turns(
    workers: dict[str, Worker], rows: dict[str, Row], settings: BenchSettings, say: Callable[[str], object]
) -> None:
    times: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(ROUNDS):
        say(f"timing: round {number + 1} of {ROUNDS}")
        for name, worker in list(workers.items()):
            try:
                times[name] += worker.ask("turn", seconds=settings.seconds / ROUNDS)
            except WorkerFailed as reason:
                rows[name].note, rows[name].failed = str(reason), True
                del workers[name]
    for name in workers:
        cuts = statistics.quantiles(times[name], n=10, method="inclusive")
        row = rows[name]
        row.median_ms, row.p20_ms, row.p80_ms = statistics.median(times[name]), cuts[1], cuts[7]
        # what was measured has two steps in it
        row.ready_s = max(0.0, (row.ready_s or 0.0) - 2e-3 * row.median_ms)


class _Reference:
    """What every peer is held against: eager PyTorch in fp32, in both layouts, and in fp64."""

    def __init__(self, recipe: Recipe, settings: BenchSettings, say: Callable[[str], object]) -> None:
        say("eager PyTorch in fp64, for comparison")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.subject = subject = recipe().to(torch.device(settings.device))
        self.notes = list(subject.notes)
        decision = Decision(subject.model, settings.decision, seed=settings.seed)
        self.flops = _flops(subject, decision)
        call, _ = build_call(PEERS["eager"], subject.model, decision, subject.inputs)
        self.is_random = is_random(*(values(subject, call, decision, seed=seed) for seed in (1, 2)))
        if self.is_random:
            quiet_dropout(subject.model)
            self.notes.append("compared with dropout switched off")
            if is_random(*(values(subject, call, decision, seed=seed) for seed in (1, 2))):
                raise NascompileError(
                    "the model draws random numbers in train mode, and not by dropout layers: no two runs "
                    "can be compared"
                )
        self.eager = [values(subject, call, decision, with_inputs=True)]
        subject.model = arranged(PEERS["eager-channels-last"], subject.model)
        given = subject.inputs
        subject.inputs = tuple(arranged(PEERS["eager-channels-last"], value) for value in given)
        self.eager.append(values(subject, call, decision, with_inputs=True))
        subject.inputs = given
        parameters = list(subject.model.parameters())
        before = cloned(parameters)
        move_by_one_rounding(subject.model)
        self.eager.append(values(subject, call, decision, with_inputs=True))
        put_back(parameters, before)
        self.exact = exact_values(subject, call, decision, with_inputs=True)

    def errors(self, found: Values) -> list[Error]:
        """How far something is from fp64."""
        return errors(found, self.eager, self.exact)


def _compare(
    reference: _Reference,
    recipe: Recipe,
    worker: Worker,
    folder: Path,
    common: dict[str, Any],
    settings: BenchSettings,
) -> list[Error]:
    peer = PEERS[worker.peer]
    if peer.runner == "single-path":
        return []
    if not reference.is_random:
        return _errors_of(worker, reference, folder, is_ours=peer.is_ours)
    if not peer.is_ours:
        # its dropout is its own, and compiling once more without may take minutes
        return []
    other = Worker(recipe, worker.peer, folder=folder, **common)
    try:
        other.ask("without_dropout")
        other.ask("prepare", limit=settings.limit)
        return _errors_of(other, reference, folder, is_ours=True)
    finally:
        other.close()


def _errors_of(worker: Worker, reference: _Reference, folder: Path, *, is_ours: bool) -> list[Error]:
    path = folder / "values.pt"
    # first the very step that is timed; gradients of the inputs make it another one
    worker.ask("values", path=str(path), with_inputs=False)
    found = torch.load(path)
    if is_ours:
        worker.ask("values", path=str(path), with_inputs=True)
        name = "gradients of the inputs"
        found[name] = torch.load(path)[name]
    return reference.errors(found)


def _flops(subject: Subject, decision: Decision) -> int | None:
    if subject.step is not None:
        return None
    architecture = None if decision.kind == "soft" else decision.architecture
    return count(subject.model, subject.inputs, architecture).flops


def matmul_rate(settings: BenchSettings) -> float:
    """FLOPs a second of the best of some fp32 matrix products on this machine: the limit of arithmetic."""
    device = torch.device(settings.device)
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
