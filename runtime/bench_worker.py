"""One peer in a process of its own: what it compiles, keeps, breaks and needs is nobody else's.

The parent asks, the worker answers; only one of the workers has something to do at any time. A worker that
does not answer in time is killed with everything it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from nascompile.runtime.bench_compare import cloned, put_back, quiet_dropout, values
from nascompile.runtime.bench_memory import keep_memory, map_large_blocks, peak_bytes
from nascompile.runtime.bench_peers import PEERS, Decision, arranged, build_call
from nascompile.runtime.bench_subject import Recipe, tensors_of
from nascompile.runtime.model_file import describe

START_LIMIT = 600.0
"""Seconds for whatever has no limit of its own: importing, building the model, one round of steps."""


MOST_LETTERS = 160
"""Of the line that says why a peer failed; compilers quote whole programs."""


class WorkerFailed(Exception):
    """The process ended, or the peer cannot run the model; the message says why in one line."""


class WorkerTimeout(WorkerFailed):
    """No answer in time; the process has been killed."""


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
        """The milliseconds of each of some steps, after one that warms the caches."""
        if not self._steady:
            keep_memory()
            self.step()
            self._steady = True
        self.step()
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            found.append(self.step())
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Worker:
    """A process for one peer. Raises WorkerFailed when it cannot be started."""

    def __init__(self, recipe: Recipe, peer: str, *, folder: Path, **settings: Any) -> None:
        self.peer = peer
        ours, theirs = Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            # cold: what an earlier run compiled would make the time to compile a matter of luck
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / peer),
            "TRITON_CACHE_DIR": str(folder / "triton" / peer),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nascompile.runtime.bench_worker", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # a process group of its own: compilers that it started end with it
                start_new_session=True,
            )
        self._connection = ours
        try:
            self._ask("__init__", START_LIMIT, recipe=recipe, peer=peer, **settings)
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, *, limit: float = START_LIMIT, **arguments: Any) -> Any:
        """The answer of a method of `Bench`. After WorkerFailed the worker is gone."""
        try:
            return self._ask(what, limit, **arguments)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process and what it started."""
        if self._connection.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _ask(self, what: str, limit: float, **arguments: Any) -> Any:
        try:
            self._connection.send((what, arguments))
            if not self._connection.poll(limit):
                raise WorkerTimeout(f"stopped after {limit:.3g} s")
            done, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise WorkerFailed(f"its process was {how}" if code < 0 else f"its process {how}") from None
        if not done:
            raise WorkerFailed(answer)
        return answer


def serve(connection: Connection) -> None:
    """Answer until the parent hangs up."""
    bench: Bench | None = None
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            if what == "__init__":
                bench, answer = Bench(**arguments), None
            else:
                method: Callable[..., Any] = getattr(bench, what)
                answer = method(**arguments)
        except Exception as error:  # whatever a compiler or a model raises is the parent's to tell
            connection.send((False, _shortened(describe(error))))
        else:
            connection.send((True, answer))


def _shortened(line: str) -> str:
    return line if len(line) <= MOST_LETTERS else f"{line[: MOST_LETTERS - 1]}…"


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
