"""The measuring core of `nascompile bench`: decisions, plain forms, the gate, memory, reports."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler.compiled import compile
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.runtime.bench import BenchSettings, bench
from nascompile.runtime.bench_compare import (
    FACTOR,
    FLOOR,
    Error,
    errors,
    exact_values,
    is_random,
    quiet_dropout,
    values,
)
from nascompile.runtime.bench_peers import DECISIONS, PEERS, Decision, build_call
from nascompile.runtime.bench_report import COLUMNS, Report, Row, plot, write_csv
from nascompile.runtime.bench_subject import Subject, from_file, squared
from tests import numerics
from tests.repository import ROOT

CHOSEN = {"first": 1, "second": 0}


class Scope(MutableScope):
    """A choice in a scope that returns its mask too."""

    def __init__(self) -> None:
        super().__init__("scope")
        candidates: list[nn.Module | None] = [
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
            nn.Identity(),
        ]
        self.choice = LayerChoice(candidates, key="second", return_mask=True)

    def forward(self, x: Tensor) -> Tensor:
        out, mask = self.choice(x)
        assert len(mask) == 3
        return out


class Net(nn.Module):
    """Choices of layers and inputs, BatchNorm, a scope, a shared key."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = LayerChoice([self._block(k) for k in (1, 3)], key="first")
        self.again = LayerChoice([self._block(k) for k in (1, 3)], reduction="mean", key="first")
        self.scope = Scope()
        self.skip = InputChoice(n_candidates=3, n_chosen=2, key="skip")
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def _block(self, size: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 4, size, padding=size // 2, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.scope(a)
        return self.head(self.drop(self.skip([a, b, self.again(b)])).relu().mean((2, 3)))


def make_subject(dropout: float = 0.0) -> Subject:
    """A subject of a few milliseconds."""
    torch.manual_seed(0)
    return Subject(Net(dropout).train(), (torch.randn(4, 4, 6, 6),), squared)


@pytest.mark.parametrize("kind", DECISIONS)
def test_the_plain_form_computes_what_the_mutator_does(kind: str) -> None:
    bound, plain = make_subject(), make_subject()
    decided, decision = Decision(bound.model, kind, seed=3), Decision(plain.model, kind, seed=3)
    call, _ = build_call(PEERS["eager"], plain.model, decision, plain.inputs)
    expected = values(bound, bound.model, decided, with_inputs=True)
    found = values(plain, call, decision, with_inputs=True)
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            numerics.assert_close(found[part][name], tensor.float().double(), name=f"{part} {name}")
    assert bool(found["gradients of the decision"]) is (kind != "sampled")


@pytest.mark.parametrize("kind", DECISIONS)
def test_ours_passes_the_gate_and_a_wrong_gradient_does_not(kind: str) -> None:
    subject, other = make_subject(), make_subject()
    decision, plain = Decision(subject.model, kind, seed=3), Decision(other.model, kind, seed=3)
    found = values(subject, compile(subject.model), decision, with_inputs=True)
    call, _ = build_call(PEERS["eager"], other.model, plain, other.inputs)
    eager = [values(other, call, plain, with_inputs=True)]
    exact = exact_values(other, call, plain, with_inputs=True)
    assert not [error for error in errors(found, eager, exact) if error.is_wrong]
    part = "gradients of the parameters"
    name = next(name for name, tensor in found[part].items() if tensor.abs().max() > 0)
    found[part][name] = found[part][name] * 1.001
    assert [error.name for error in errors(found, eager, exact) if error.is_wrong] == [part]
    del found[part][name]
    assert next(error for error in errors(found, eager, exact) if error.name == part).ours == float("inf")


def test_values_change_nothing() -> None:
    subject = make_subject()
    decision = Decision(subject.model, "soft", seed=0)
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    first = values(subject, subject.model, decision)
    assert all(torch.equal(before[name], t) for name, t in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert not is_random(first, values(subject, subject.model, decision, seed=5))
    assert not first["gradients of the inputs"]


def test_dropout_is_noticed_and_silenced() -> None:
    subject = make_subject(dropout=0.5)
    decision = Decision(subject.model, "soft", seed=0)
    runs = [values(subject, subject.model, decision, seed=seed) for seed in (1, 2)]
    assert is_random(*runs)
    assert quiet_dropout(subject.model) == [subject.model.drop]
    assert not is_random(*[values(subject, subject.model, decision, seed=seed) for seed in (1, 2)])


def test_the_rule_is_that_of_the_tests() -> None:
    assert (numerics.FACTOR, numerics.FLOORS[torch.float32]) == (FACTOR, FLOOR)
    assert Error("output", 1e-6, 0.0).is_wrong is False
    assert Error("output", 2.1e-3, 1e-3).is_wrong is True
    assert Error("output", float("nan"), 1e-3).is_wrong is True


def test_peak_memory_counts_the_peak_and_what_is_kept() -> None:
    command = [sys.executable, "-m", "tests.runtime.peak_of_a_step"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.split()
    if lines == ["unknown"] * 2:
        pytest.skip("this system does not count peaks")
    # the step alone, and with 8 MiB that are kept
    assert [float(line) for line in lines] == pytest.approx([32, 40], abs=4)


def report(**change: Any) -> Report:
    """Two peers and ours; `change` is of ours."""
    rows = [
        Row("eager", 0.1, 30.0, 29.0, 31.0, 100.0),
        Row("torch.compile", note="stopped after 120 s", failed=True),
        Row("nascompile", 0.5, 10.0, 9.0, 12.0, **{"memory_mib": 50.0, **change}),
    ]
    return Report("toy", rows, [Error("output", 1e-7, 1e-7)], 3e9, 1e12, "a machine", "soft")


def test_ratios_are_against_the_best_other_peer() -> None:
    found = report()
    found.rows.append(Row("eager-channels-last", 0.1, 20.0, 19.0, 21.0, 200.0))
    eager, stopped, ours, _ = found.rows
    assert found.speed(ours) == 2.0
    assert found.memory_ratio(ours) == 2.0
    assert found.speed(eager) == pytest.approx(2 / 3)
    assert found.speed(stopped) is None
    assert found.arithmetic(ours) == pytest.approx(0.3)
    # a peer with wrong results is no standard
    found.rows[-1].note = "wrong output"
    assert found.speed(ours) == 3.0


def test_no_ratio_while_a_comparison_fails() -> None:
    found = report()
    found.errors.append(Error("buffers", 1.0, 1e-7))
    assert found.wrong
    assert found.speed(found.rows[2]) is None
    assert found.memory_ratio(found.rows[2]) is None
    failed = report(note="RuntimeError: no", failed=True)
    assert failed.wrong == ["nascompile: RuntimeError: no"]


def test_report_files(tmp_path: Path) -> None:
    found = report(memory_mib=None)
    write_csv(found, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [line["speed"] for line in lines] == ["1", "", "3"]
    assert lines[1]["note"] == "stopped after 120 s"
    plot(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peers": ("eagre",)}, "unknown peer 'eagre'; known: eager, "),
        ({"seconds": 0.0}, "seconds is 0, expected a positive number"),
        ({"limit": float("inf")}, "compile-limit is inf"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_refuse_what_makes_no_sense(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(NascompileError, match=problem):
        BenchSettings(**change)
    with pytest.raises(NascompileError, match="unknown decision 'hard'"):
        Decision(make_subject().model, "hard", seed=0)


QUICK = BenchSettings(peers=("eager", "eager-channels-last", "nascompile"), seconds=0.05, threads=1)


class Made:
    """A recipe that fails in the process of one peer, or of the reference (its name is empty)."""

    def __init__(self, here: int, peer: str | None, problem: str, *, late: bool = True) -> None:
        self.here, self.peer, self.problem, self.late = here, peer, problem, late

    def __call__(self) -> Subject:
        assert os.getpid() != self.here, "only other processes may hold the model"
        subject = make_subject()
        if Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")).name == self.peer:
            if not self.late:
                raise NascompileError(self.problem)
            subject.loss = self.fail
        return subject

    def fail(self, output: Tensor) -> Tensor:
        """As the system does, or as torch does."""
        if not self.problem:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(self.problem)


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are told by the folder they compile into."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)


@pytest.mark.usefixtures("no_caches")
def test_a_peer_that_is_killed_is_a_row() -> None:
    found = bench(Made(os.getpid(), "eager-channels-last", ""), QUICK)
    eager, killed, ours = found.rows
    assert killed.note == "its process was killed by signal 9, as the system does when memory runs out"
    assert killed.failed
    assert not found.wrong
    assert found.speed(eager) == 1.0
    assert found.speed(ours) is not None


@pytest.mark.usefixtures("no_caches")
@pytest.mark.parametrize("problem", ["", "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"])
def test_a_reference_without_memory_leaves_times_without_ratios(problem: str) -> None:
    found = bench(Made(os.getpid(), "", problem), QUICK)
    (line,) = found.wrong
    assert line.startswith("nothing was compared, eager PyTorch in fp64 failed: ")
    assert line.endswith(problem or "killed by signal 9, as the system does when memory runs out")
    assert all(row.median_ms and not row.failed and found.speed(row) is None for row in found.rows)


@pytest.mark.usefixtures("no_caches")
def test_errors_of_the_recipe_reach_the_caller() -> None:
    line = f"a line {'that goes on ' * 20}to its end"
    with pytest.raises(NascompileError) as refused:
        bench(Made(os.getpid(), "", line, late=False), QUICK)
    assert str(refused.value) == line
    # what is nobody's to mend keeps its traceback
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in fail.*RuntimeError: broken"):
        bench(Made(os.getpid(), "", "broken"), QUICK)


FILE = """
import torch
from torch import nn
from nascompile.mutables import LayerChoice
model = nn.Sequential(LayerChoice([nn.Linear(5, 2), nn.Linear(5, 2)], key="op"))
"""
DATA = "dataset_train = [(torch.ones(5) * i, i % 2) for i in range(3)]\n"


def test_a_subject_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(f"{FILE}example_inputs = torch.randn(3, 5)\n")
    assert from_file(path, None, 0).inputs[0].shape == (3, 5)
    grown = from_file(path, 8, 0)
    assert grown.inputs[0].shape == (8, 5)
    assert not torch.equal(grown.inputs[0][0], grown.inputs[0][3])
    again = from_file(path, 8, 0)
    assert torch.equal(grown.inputs[0], again.inputs[0])
    assert all(map(torch.equal, grown.model.parameters(), again.model.parameters()))
    path.write_text(FILE + DATA)
    found = from_file(path, 7, 0)
    assert found.inputs[0].shape == (7, 5)
    # cross entropy of equal logits
    assert found.loss(torch.zeros(7, 2)).item() == pytest.approx(0.6931, abs=1e-4)
