"""Median and spread of a call's time, on the CPU or the GPU, with warm memory and interleaved peers."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nascompile.runtime.bench_memory import keep_memory
from nascompile.runtime.bench_report import processor

__all__ = ["Timing", "keep_memory", "machine", "summarise", "time_on_cpu", "time_on_gpu"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def summarise(milliseconds: list[float]) -> Timing:
    cuts = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Timing(median=statistics.median(milliseconds), p20=cuts[1], p80=cuts[7])


def time_on_cpu(calls: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, Timing]:
    """Time the calls in turn until `seconds` have passed: in turn, so that a busy moment hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, found.values())) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - start) * 1e3)
    return {name: summarise(times) for name, times in found.items()}


def time_on_gpu(calls: dict[str, Callable[[], object]], *, repeats: int = 50) -> dict[str, Timing]:
    """Time every call by events, in turn, with a second-level cache that holds nothing of the last call."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    found: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            found[name].append((start, end))
    torch.cuda.synchronize()
    return {name: summarise([a.elapsed_time(b) for a, b in events]) for name, events in found.items()}


def machine() -> str:
    """The processor or GPU and the versions that a figure belongs to."""
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {versions}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {threads}, {versions}"
