"""Peers in processes of their own: what the parent hears from them, and from those that break."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nascompile.compiler.mutables import LayerChoice
from nascompile.runtime.bench_process import MOST_LETTERS, START_LIMIT, Process, WorkerFailed, serve
from nascompile.runtime.bench_subject import Subject, squared
from nascompile.runtime.bench_worker import Bench, Worker

SETTINGS: dict[str, Any] = {"kind": "soft", "seed": 0, "threads": None, "device": "cpu"}


def linear(problem: str = "") -> Subject:
    """A choice of two linear layers; a loss that raises `problem`."""
    torch.manual_seed(0)
    model = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4)], key="op"))

    def loss(output: torch.Tensor) -> torch.Tensor:
        if problem:
            raise RuntimeError(problem)
        return squared(output)

    return Subject(model.train(), (torch.randn(3, 4),), loss)


class Talk:
    """`serve` in a thread."""

    def __init__(self) -> None:
        self.ours, theirs = Pipe()
        self.thread = threading.Thread(target=serve, args=(theirs,))
        self.thread.start()

    def __call__(self, what: str, **arguments: Any) -> Any:
        self.ours.send((what, arguments))
        assert self.ours.poll(30)
        return self.ours.recv()

    def end(self) -> None:
        """Hang up."""
        self.ours.close()
        self.thread.join(30)
        assert not self.thread.is_alive()


def test_a_worker_answers(tmp_path: Path) -> None:
    talk = Talk()
    try:
        assert talk("__init__", make=Bench, recipe=linear, peer="nascompile", **SETTINGS) == (True, None)
        done, seconds = talk("prepare")
        assert done
        assert seconds > 0
        done, peak = talk("memory")
        assert done
        assert peak is None or peak >= 0
        path = tmp_path / "values.pt"
        assert talk("values", path=str(path), with_inputs=True) == (True, None)
        found = torch.load(path)
        assert [tuple(t.shape) for t in found["gradients of the inputs"].values()] == [(3, 4)]
        assert found["gradients of the decision"]["op"].abs().sum() > 0
    finally:
        talk.end()


def test_an_error_is_one_line_of_bounded_length() -> None:
    talk = Talk()
    try:
        problem = "this goes\nwrong " + 200 * "and on "
        talk("__init__", make=Bench, recipe=partial(linear, problem), peer="eager", **SETTINGS)
        done, found = talk("prepare")
        assert not done
        line = found.line
        assert line.startswith("RuntimeError: this goes wrong and on")
        assert line.endswith("…")
        assert len(line) == MOST_LETTERS
    finally:
        talk.end()


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="its process ended with exit code 3"):
        Worker(partial(os._exit, 3), "eager", folder=tmp_path, **SETTINGS)


class Watched(Bench):
    """Tells of its process."""

    def resident(self) -> int:
        """MiB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

    def score(self) -> str:
        """How soon the system ends it for memory."""
        return Path("/proc/self/oom_score_adj").read_text().strip()

    def end(self) -> None:
        """End it as the system does."""
        os.kill(os.getpid(), signal.SIGKILL)


def wide() -> Subject:
    """A step that holds 64 MiB in pieces of 1 MiB."""
    torch.manual_seed(0)
    model = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4)], key="op"))

    def loss(output: torch.Tensor) -> torch.Tensor:
        pieces = [torch.ones(2**18) for _ in range(64)]
        return squared(output) + sum(piece[0] for piece in pieces)

    return Subject(model.train(), (torch.randn(3, 4),), loss)


@pytest.fixture
def watched() -> Iterator[Process]:
    """A peer that has compiled."""
    process = Process(Watched, environment={}, limit=START_LIMIT, recipe=wide, peer="eager", **SETTINGS)
    try:
        process.ask("prepare")
        yield process
    finally:
        process.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_between_its_turns_a_peer_holds_no_freed_memory(watched: Process) -> None:
    before = watched.ask("resident")
    for _ in range(2):
        assert len(watched.ask("turn", seconds=0.01)) > 0
        assert watched.ask("resident") < before + 32


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="needs Linux' /proc")
def test_where_memory_ends_the_worker_ends_first(watched: Process) -> None:
    assert watched.ask("score") == "1000"
    with pytest.raises(WorkerFailed, match="killed by signal 9, as the system does when memory runs out"):
        watched.ask("end")


def test_a_limit_ends_the_process(watched: Process) -> None:
    with pytest.raises(WorkerFailed, match=r"stopped after 0.01 s"):
        watched.ask("turn", limit=0.01, seconds=30)
