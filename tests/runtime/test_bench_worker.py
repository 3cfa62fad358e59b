"""Peers in processes of their own: what the parent hears from them, and from those that break."""

from __future__ import annotations

import os
import threading
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nascompile.compiler.mutables import LayerChoice
from nascompile.runtime.bench_subject import Subject, squared
from nascompile.runtime.bench_worker import MOST_LETTERS, Worker, WorkerFailed, serve

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
        assert talk("__init__", recipe=linear, peer="nascompile", **SETTINGS) == (True, None)
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
        talk("__init__", recipe=partial(linear, problem), peer="eager", **SETTINGS)
        done, line = talk("prepare")
        assert not done
        assert line.startswith("RuntimeError: this goes wrong and on")
        assert line.endswith("…")
        assert len(line) == MOST_LETTERS
    finally:
        talk.end()


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="its process ended with exit code 3"):
        Worker(partial(os._exit, 3), "eager", folder=tmp_path, **SETTINGS)
