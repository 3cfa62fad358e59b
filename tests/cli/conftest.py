"""The command line in this process, and a model file that searches in a second."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nascompile.cli import run

ROOT = Path(__file__).resolve().parents[2]

TINY = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from nascompile.mutables import InputChoice, LayerChoice


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = LayerChoice([nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 8), nn.ReLU())], key="first")
        self.second = LayerChoice([nn.Linear(8, 8), nn.Identity()], key="second")
        self.skip = InputChoice(n_candidates=1, n_chosen=None, key="skip")
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        y = self.drop(self.second(x))
        old = self.skip([x])
        return self.head(y if old is None else y + old)


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


model = Net
dataset_train = data(64, 0)
dataset_valid = data(32, 1)
dataset_test = data(32, 2)
search_options = {"enas": {"child_steps": 2, "mutator_steps": 1, "mutator_steps_aggregate": 2}}
"""

FAST = ("--batch-size", "16", "--device", "cpu")


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str


class CommandLine:
    """Runs command lines in `folder`, in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def write(self, text: str = TINY, name: str = "net.py") -> Path:
        """Write a model file."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def __call__(self, *args: str | Path) -> Result:
        self._capsys.readouterr()
        code = run([str(arg) for arg in args])
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def good(self, *args: str | Path) -> str:
        """The output of a command that has to succeed."""
        result = self(*args)
        assert result.code == 0, result.err
        return result.out

    def bad(self, *args: str | Path) -> str:
        """The one line on stderr of a command that has to be refused."""
        result = self(*args)
        assert result.code == 2, f"{result.code}: {result.out}"
        lines = result.err.splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("nascompile: ")
        return lines[0].removeprefix("nascompile: ")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line, with `tmp_path` as working folder."""
    monkeypatch.chdir(tmp_path)
    # the folders of model files are put on the path
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    return CommandLine(tmp_path, capsys)


@pytest.fixture
def process_environment() -> dict[str, str]:
    """The environment for command lines in processes of their own."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def command(*args: str | Path) -> Sequence[str]:
    """A command line for a process of its own."""
    return [sys.executable, "-m", "nascompile", *map(str, args)]


@pytest.fixture(autouse=True)
def heeds_interrupts() -> Iterator[None]:
    """A shell starts background jobs with Ctrl-C ignored; children inherit it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
