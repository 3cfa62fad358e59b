"""What became of candidates in plans, by choice; what that gains; where the time of a step goes."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import nascompile
from nascompile.compiler.explain import explain
from nascompile.compiler.gain_table import gain_table
from nascompile.compiler.gains import EdgeGain, Gains, Pair, Profiled
from nascompile.compiler.region.ir import Weight
from nascompile.compiler.region.owners import Part, parts_of
from nascompile.compiler.region.plan import Plan
from nascompile.compiler.region.profiling import active, profiling
from nascompile.compiler.roofline import Counter, Machine
from nascompile.kernels import native
from nascompile.kernels.plan.steps import Combine, Convolve, Pool, Stage, Unstage
from nascompile.kernels.plan.traffic import cost, memory
from nascompile.mutables import InputChoice, LayerChoice
from tests.comparing import Decided
from tests.compiler.region_models import SepConv

pytestmark = pytest.mark.skipif(native.load()[1] is not None, reason="needs the C++ extension")

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def edge(key: str) -> LayerChoice:
    layers: OrderedDict[str, Any] = OrderedDict(
        sep=SepConv(8, 3), pool=nn.MaxPool2d(3, 1, 1), skip=nn.Identity(), none=Zero()
    )
    return LayerChoice(layers, key=key)


class Net(nn.Module):
    """Two edges that read one source and meet in one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.a, self.b = edge("a"), edge("b")
        self.both = InputChoice(n_candidates=2, key="both")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.both([self.a(x), self.b(x)])


def trained() -> tuple[nascompile.CompiledModel, Any]:
    """The compiled model, and a step of it under soft decisions."""
    model = Net()
    compiled, mutator = nascompile.compile(model), Decided(model)
    soft = {key: torch.full((4,), 0.25, requires_grad=True) for key in "ab"}
    mutator.decide({**soft, "both": torch.ones(2, dtype=torch.bool)})
    return compiled, lambda: compiled(X).square().mean().backward()


@pytest.fixture(scope="module")
def plan() -> Plan:
    compiled, step = trained()
    step()
    ((region,),) = [entry.regions for entry in compiled.entries]
    return region.plans[-1]


@pytest.fixture(scope="module")
def gains() -> Gains:
    found = explain(Net(), X, gains="measured").edges
    assert isinstance(found, Gains)
    return found


# ----- whom operations serve


def of_kind(plan: Plan, kind: type, direction: str = "forward") -> list[Part]:
    return [p for p in parts_of(plan) if isinstance(p.operation, kind) and p.direction == direction]


def test_every_operation_says_whom_it_serves(plan: Plan):
    assert plan.backward is not None
    programs = [plan.forward.program, plan.backward.program]
    expected = [op for p in programs for phase in p.phases for op in (*phase.barriers, *phase.steps)]
    assert [part.operation for part in parts_of(plan)] == expected
    assert all(part.values for part in parts_of(plan))


def test_convolutions_serve_one_candidate_and_a_pool_both_edges(plan: Plan):
    owners = [{tuple(owner)[:2] for owner in part.owners} for part in of_kind(plan, Convolve)]
    assert owners.count({("a", 0)}) == owners.count({("b", 0)}) == 2
    (pool,) = of_kind(plan, Pool)
    assert {tuple(owner)[:2] for owner in pool.owners} == {("a", 1), ("b", 1)}
    # the stem serves whoever is chosen
    assert owners.count(set()) == 1


def test_the_sum_and_the_staging_of_one_source_serve_both_edges(plan: Plan):
    sums = [part.keys for part in of_kind(plan, Combine) if len(part.operation.terms) > 2]
    assert sums == [{"a", "b", "both"}]
    assert {"a", "b"} in [part.keys for part in of_kind(plan, Stage)]


def test_the_steps_of_gradients_serve_those_of_the_values(plan: Plan):
    backward = [part for part in parts_of(plan) if part.direction == "backward" and part.is_step]
    assert {"a"} in [part.keys for part in backward]
    assert {"b"} in [part.keys for part in backward]


def test_a_gradient_that_is_gathered_for_several_serves_all_of_them():
    convs = [nn.Conv2d(8, 8, size, padding=size // 2) for size in (3, 5)]
    choice = LayerChoice([nn.Sequential(nn.ReLU(), conv) for conv in convs], key="op")
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), choice, nn.BatchNorm2d(8), edge("end"))
    compiled, mutator = nascompile.compile(model), Decided(model)
    mutator.decide({"op": torch.ones(2, requires_grad=True), "end": torch.ones(4, requires_grad=True)})
    compiled(X).square().mean().backward()
    (region,) = [region for entry in compiled.entries for region in entry.regions]
    owners = [part.owners for part in of_kind(region.plans[-1], Unstage, "backward")]
    assert {Weight("op", 0), Weight("op", 1)} in owners


# ----- in words


def test_fates_of_candidates(gains: Gains):
    fates = {gain.key: dict(gain.fates) for gain in gains.edges}
    assert fates["a"] == fates["b"]
    assert "2 depthwise+pointwise" in fates["a"]["sep"]
    assert "2 BatchNorm" in fates["a"]["sep"]
    assert fates["a"]["pool"] == "max pool"
    assert fates["a"]["skip"] == "a term of the sum"
    assert fates["a"]["none"] == "dropped: zeros"
    assert set(fates["both"].values()) == {"a term of the sum"}


def test_what_is_shared_is_said_with_whom(gains: Gains):
    (a,) = [gain for gain in gains.edges if gain.key == "a"]
    assert any("max pool" in line and line.endswith("with b") for line in a.shared)
    assert "sum with b, both" in a.shared


# ----- in figures


def test_least_seconds_of_operators():
    machine = Machine(bandwidth=1e9, rate=1e6)
    with Counter(machine) as counter:
        X.relu()
    assert counter.seconds == pytest.approx(2 * X.nbytes / 1e9)
    weight = torch.ones(8, 8, 1, 1)
    with Counter(machine) as counter:
        nn.functional.conv2d(X, weight).flatten(1)
    assert counter.seconds == pytest.approx(2 * X.numel() * 8 / 1e6)


def test_bytes_of_a_step_leave_scratch_out(plan: Plan):
    (pool,) = of_kind(plan, Pool)
    image = 4 * 6 * 6 * pool.operation.x.channels
    # the pool reads and writes maps of one size, a stage writes scratch
    assert memory(pool.operation) == 2 * image
    assert {memory(part.operation) for part in of_kind(plan, Stage)} == {image}


def test_gains_are_predicted_and_measured(gains: Gains):
    assert {gain.key for gain in gains.edges} == {"a", "b", "both"}
    for gain in gains.edges:
        assert gain.measured is not None
        assert gain.measured.plan is not None
        assert gain.measured.eager > 0
        assert gain.measured.plan > 0
        assert gain.places == 1
    assert gains.step is not None
    assert gains.batch == len(X)
    seconds = [gain.seconds for gain in gains.edges]
    assert seconds == sorted(seconds, reverse=True)
    # the edges are equal, and what they share counts half for each
    a, b = (gain for gain in gains.edges if gain.key in "ab")
    assert a.predicted.eager == pytest.approx(b.predicted.eager)
    assert a.predicted.plan == pytest.approx(b.predicted.plan)


def test_what_is_shared_counts_in_equal_parts():
    _, step = trained()
    step()
    with profiling() as profile:
        step()
    machine = Machine(bandwidth=1e9, rate=1e9)
    by_choice = Profiled(profile, machine, 1)
    timed = [seconds for run in profile.runs for _, seconds in run.parts()]
    assert sum(by_choice.seconds.values()) == pytest.approx(sum(timed))
    operations = [part.operation for run in profile.runs for part, _ in run.parts()]
    least = [machine.seconds(len(X) * cost(op)[0], len(X) * memory(op)) for op in operations]
    assert sum(by_choice.least.values()) == pytest.approx(sum(least))


def test_a_prediction_measures_no_choice():
    found = explain(Net(), X).edges
    assert isinstance(found, Gains)
    assert found.step is None
    assert all(gain.measured is None and gain.predicted.plan for gain in found.edges)


def test_without_gains_there_are_none():
    found = explain(Net(), X, gains=None)
    assert found.edges == "not asked for"
    out = io.StringIO()
    found.render(Console(file=out))
    assert "gain" not in out.getvalue()


def test_the_model_stays_as_it_was():
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    explain(model, X, gains="measured")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.a.bound_mutator is None


def test_nested_choices_count_once():
    inner = LayerChoice([nn.Conv2d(8, 8, 3, padding=1), nn.Identity()], key="inner")
    outer = LayerChoice([nn.Sequential(inner, nn.ReLU()), nn.Identity()], key="outer")
    model = nn.Sequential(edge("plain"), outer)
    found = explain(model, X).edges
    assert isinstance(found, Gains)
    assert {gain.key: gain.is_nested for gain in found.edges} == {
        "plain": False,
        "inner": True,
        "outer": False,
    }
    by_key = {gain.key: gain for gain in found.edges}
    assert by_key["outer"].predicted.eager > by_key["inner"].predicted.eager


def test_candidates_that_change_their_input_are_timed():
    last = LayerChoice([nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)], key="last")
    model = nn.Sequential(edge("first"), nn.BatchNorm2d(8), last)
    found = explain(model, X, gains="measured").edges
    assert isinstance(found, Gains)
    (gain,) = [gain for gain in found.edges if gain.key == "last"]
    assert gain.measured is not None
    assert gain.measured.eager > 0


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (
            LayerChoice([nn.Linear(4, 4), nn.Identity()]),
            torch.ones(2, 4),
            "no part of the model runs in a plan",
        ),
        (edge("single"), torch.ones(1, 8, 1, 1), "a training step fails: ValueError: Expected more than 1"),
    ],
)
def test_why_there_are_no_gains(model: nn.Module, x: Tensor, reason: str):
    found = explain(model, x).edges
    assert isinstance(found, str)
    assert reason in found


def test_an_unknown_kind_of_gains_is_refused():
    with pytest.raises(ValueError, match="gains is 'guessed', expected one of"):
        explain(Net(), X, gains="guessed")


# ----- on the screen


def shown(gains: Gains, most: int | None = 20) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=120).print(gain_table(gains, most))
    return out.getvalue().splitlines()


def row(lines: list[str], begins: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"│ {begins}")]
    return line.strip("│ ").split()


def test_the_costliest_are_shown_and_the_rest_summed():
    edges = tuple(
        EdgeGain(f"e{i}", 1, False, (), (), Pair(4e-3, 2e-3 if i else None), Pair(8e-3, 1e-3))
        for i in range(4)
    )
    gains = Gains(edges, Machine(1e9, 1e9), Pair(0.0, 0.0), 0.0, Pair(0.1, 0.02), None)
    lines = shown(gains, 2)
    figures = [cell for cell in row(lines, "2 more choices") if cell != "│"]
    assert figures == ["2", "more", "choices", "8", "4", "2.0x", "16", "2", "8.0x"]
    assert [cell for cell in row(lines, "e0") if cell != "│"] == ["e0", "4", "no", "plan", "8", "1", "8.0x"]
    assert not any(line.startswith("│ e2") for line in lines)
    assert any("100" in line and "20" in line and "5.0x" in line for line in lines)
    assert any(line.startswith("│ e3") for line in shown(gains, None))


def test_alike_choices_are_described_once(gains: Gains):
    lines = shown(gains)
    assert sum("dropped: zeros" in line for line in lines) == 1
    assert any("candidates as in" in line for line in lines)
    assert any("a batch of 4" in line for line in lines)


# ----- where the time goes


def test_a_profile_lists_what_ran():
    _, step = trained()
    # the first step checks the trace as well
    step()
    with profiling() as profile:
        step()
        step()
    assert [run.name for run in profile.runs] == ["forward", "backward"] * 2
    entries = {name: entry for (way, name), entry in profile.entries.items() if way == "forward"}
    (pool,) = [entry for name, entry in entries.items() if name.startswith("max pool")]
    assert pool.calls == 2
    assert pool.seconds > 0
    assert active() is None


def test_a_profile_prints_shares_and_rates():
    _, step = trained()
    found = nascompile.profile(step, rounds=2)
    assert len(found.runs) == 4
    lines = found.table(3).splitlines()
    assert lines[0].split() == ["share", "ms", "calls", "GFLOP/s", "GB/s", "operation"]
    assert len(lines) == 1 + 3 + 1
    assert lines[-1].endswith(f"{len(found.entries) - 3} more")
    assert sum(float(line.split("%")[0]) for line in lines[1:]) == pytest.approx(100, abs=0.5)
    assert str(found).count("max pool") == 2


def test_a_profile_without_plans_says_so():
    assert nascompile.profile(lambda: None).table() == "no plan ran in C++"
