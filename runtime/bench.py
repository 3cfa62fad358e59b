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
from nascompile.runtime.bench_compare import Error
from nascompile.runtime.bench_peers import PEERS, find_peer
from nascompile.runtime.bench_process import WorkerFailed
from nascompile.runtime.bench_reference import Facts, Reference, ReferenceProcess
from nascompile.runtime.bench_report import Report, Row, machine
from nascompile.runtime.bench_subject import Recipe
from nascompile.runtime.bench_worker import Worker

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


def default_peers(settings: BenchSettings, *, has_maps: bool) -> tuple[str, ...]:
    """Eager in both layouts, torch.compile, ours; for a sampled path, that path as a network too."""
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

    Raises NascompileError where the recipe does, and for a model that cannot be compared. A peer that fails
    is a row that says why. The recipe is called in other processes only.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    common: dict[str, Any] = {
        "kind": settings.decision,
        "seed": settings.seed,
        "threads": settings.threads,
        "device": settings.device,
    }
    rate = matmul_rate(settings)
    workers: dict[str, Worker] = {}
    found: list[Error] = []
    with tempfile.TemporaryDirectory(prefix="nascompile-bench-") as place:
        folder = Path(place)
        say("eager PyTorch in fp64, for comparison")
        facts, reference = _reference(recipe, folder, common)
        names = settings.peers or default_peers(settings, has_maps=facts.has_maps)
        rows = {name: Row(peer=name) for name in names}
        try:
            for name, row in rows.items():
                say(f"{name}: compiling")
                try:
                    workers[name] = worker = Worker(recipe, name, folder=folder, **common)
                    row.ready_s = worker.ask("prepare", limit=settings.limit)
                    peak = worker.ask("memory")
                    row.memory_mib = None if peak is None else peak / 2**20
                    say(f"{name}: comparing")
                    problems = _compare(reference, recipe, worker, folder, common, settings)
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
        flops=None if facts.flops is None else PASSES * facts.flops,
        matmul_rate=rate,
        machine=machine(settings),
        decision=settings.decision,
        notes=_notes(facts, reference),
        uncompared=reference if isinstance(reference, str) else "",
    )


def _reference(recipe: Recipe, folder: Path, common: dict[str, Any]) -> tuple[Facts, Reference | str]:
    """What is known of the subject, and its values; a string says why there are none."""
    try:
        process = ReferenceProcess(recipe, path=folder / "reference.pt", **common)
        facts = process.facts()
    except WorkerFailed as reason:
        raise NascompileError(f"the model cannot be made: {reason}") from None
    try:
        return facts, process.compute()
    except WorkerFailed as reason:
        return facts, f"nothing was compared, eager PyTorch in fp64 failed: {reason}"
    finally:
        process.close()


def _notes(facts: Facts, reference: Reference | str) -> list[str]:
    is_quiet = not isinstance(reference, str) and reference.is_random
    return [*facts.notes, *(["compared with dropout switched off"] if is_quiet else [])]


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


def _compare(
    reference: Reference | str,
    recipe: Recipe,
    worker: Worker,
    folder: Path,
    common: dict[str, Any],
    settings: BenchSettings,
) -> list[Error]:
    peer = PEERS[worker.peer]
    if isinstance(reference, str) or peer.runner == "single-path":
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


def _errors_of(worker: Worker, reference: Reference, folder: Path, *, is_ours: bool) -> list[Error]:
    path = folder / "values.pt"
    # first the very step that is timed; gradients of the inputs make it another one
    worker.ask("values", path=str(path), with_inputs=False)
    found = torch.load(path)
    if is_ours:
        worker.ask("values", path=str(path), with_inputs=True)
        name = "gradients of the inputs"
        found[name] = torch.load(path)[name]
    return reference.errors(found)


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
