"""One peer in a process of its own: what it compiles, keeps, breaks and needs is nobody else's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from nascompile.runtime.bench_compare import cloned, put_back, quiet_dropout, values
from nascompile.runtime.bench_memory import give_back_memory, keep_memory, map_large_blocks, peak_bytes
from nascompile.runtime.bench_peers import PEERS, Decision, arranged, build_call
from nascompile.runtime.bench_process import START_LIMIT, Process
from nascompile.runtime.bench_subject import Recipe, tensors_of


class Bench:
    """What the process of a worker holds: the subject as one peer runs it."""

    def __init__(
        self, recipe: Recipe, peer: str, kind: str, seed: int, threads: int | None, device: str
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        map_large_blocks()
        self.peer, self.device = PEERS[peer], torch.device(device)
        self.subject = recipe().to(self.device)
        self.subject.model = arranged(self.peer, self.subject.model)
        self.subject.inputs = tree_map(lambda value: arranged(self.peer, value), self.subject.inputs)
        self.decision = Decision(self.subject.model, kind, seed=seed)
        self._buffers = cloned(self.subject.model.buffers())
        self._steady = False

    def prepare(self) -> float:
        """Compile; returns the seconds until the second step is over, steps included."""
        start = time.perf_counter()
        self.call, self.trained = build_call(
            self.peer, self.subject.model, self.decision, self.subject.inputs
        )
        self.leaves = [*self.trained.parameters(), *self.decision.logits.values()]
        for _ in range(2):
            self.step()
        return time.perf_counter() - start

    def step(self) -> float:
        """One training step; returns its milliseconds."""
        for leaf in self.leaves:
            leaf.grad = None
        self._wait()
        start = time.perf_counter()
        self.subject.run(self.call, self.decision)
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def memory(self) -> int | None:
        """The peak of one step in bytes."""
        self.step()
        for leaf in self.leaves:
            leaf.grad = None
        own = [*tensors_of(self.subject, self.decision), *self.trained.parameters(), *self.trained.buffers()]
        return peak_bytes(lambda: self.subject.run(self.call, self.decision), own, self.device)

    def values(self, path: str, with_inputs: bool) -> None:
        """Save what one step computes, from the state in which the model was made."""
        if self.trained is self.subject.model:
            put_back(self.trained.buffers(), self._buffers)
        found = values(self.subject, self.call, self.decision, trained=self.trained, with_inputs=with_inputs)
        torch.save(found, path)

    def without_dropout(self) -> None:
        """Switch dropout off, before anything is compiled."""
        quiet_dropout(self.subject.model)

    def turn(self, seconds: float) -> list[float]:
        """The milliseconds of each of some steps, after one that warms the caches and takes its memory.

        Freed memory is kept from step to step, and given back at the end: the others need it, and all peers
        together may need more than there is.
        """
        if not self._steady:
            keep_memory()
            self.step()
            self._steady = True
        self.step()
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            found.append(self.step())
        give_back_memory()
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Worker(Process):
    """A process that holds the `Bench` of one peer. Raises WorkerFailed when it cannot be started."""

    def __init__(self, recipe: Recipe, peer: str, *, folder: Path, **settings: Any) -> None:
        self.peer = peer
        # cold: what an earlier run compiled would make the time to compile a matter of luck
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / peer),
            "TRITON_CACHE_DIR": str(folder / "triton" / peer),
        }
        super().__init__(Bench, environment=caches, limit=START_LIMIT, recipe=recipe, peer=peer, **settings)
