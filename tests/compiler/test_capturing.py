"""What regions do while a CUDA graph is captured, and whether they are trusted on a GPU. No GPU is needed."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nascompile.compiler.region import region, selftest
from nascompile.compiler.region.executors import NATIVE, TRITON
from nascompile.compiler.region.selftest import why_not_trusted
from nascompile.kernels import capturing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_VERDICTS", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_what_a_graph_reads_is_held_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "_FOREVER", [])

    class Thing:
        pass

    def capture() -> tuple[list[Any], Any]:
        thing = Thing()
        with capturing.holding() as held:
            capturing.hold(thing)
        return held, weakref.ref(thing)

    held, thing = capture()
    capturing.hold(Thing())
    gc.collect()
    assert thing() is not None
    assert len(held) == 1
    held.clear()
    gc.collect()
    assert thing() is None


def test_what_nobody_collects_is_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that someone captures by hand does not say when it goes."""
    kept: list[Any] = []
    monkeypatch.setattr(capturing, "_FOREVER", kept)
    capturing.hold("a", "b")
    with capturing.holding() as held:
        capturing.hold("c")
    assert (kept, held) == (["a", "b"], ["c"])


def test_only_gpus_capture() -> None:
    assert not capturing.is_capturing(CPU)


# ----- trust


def test_the_cpu_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "problems", pytest.fail)
    assert why_not_trusted(CPU) is None


def test_a_gpu_is_tested_once_for_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def problems(device: torch.device, width: int) -> list[str]:
        # the test runs plans, which ask
        assert why_not_trusted(device) is None
        asked.append((device, width))
        return []

    monkeypatch.setattr(selftest, "problems", problems)
    assert [why_not_trusted(GPU), why_not_trusted(GPU)] == [None, None]
    assert asked == [(GPU, width) for width in selftest.WIDTHS]


def test_a_gpu_that_is_wrong_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "problems", lambda device, width: [f"{width} is off"])
    found = [why_not_trusted(GPU), why_not_trusted(GPU)]
    assert found == ["the kernels failed their test on some GPU (5 is off, 3 in all)"] * 2


def test_a_test_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(device: torch.device, width: int) -> list[str]:
        raise RuntimeError("no kernel image\n is available")

    monkeypatch.setattr(selftest, "problems", problems)
    assert "RuntimeError: no kernel image is available" in str(why_not_trusted(GPU))


def test_nothing_is_tested_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "problems", lambda device, width: [])
    with monkeypatch.context() as patches:
        patches.setattr(capturing, "is_capturing", lambda device: True)
        assert "call the model once before" in str(why_not_trusted(GPU))
    assert why_not_trusted(GPU) is None


def test_a_gpu_without_memory_is_tested_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [torch.OutOfMemoryError("full")]

    def problems(device: torch.device, width: int) -> list[str]:
        if answers:
            raise answers.pop()
        return []

    monkeypatch.setattr(selftest, "problems", problems)
    assert "no memory left" in str(why_not_trusted(GPU))
    assert why_not_trusted(GPU) is None


@torch.inference_mode()
def test_the_test_runs_in_inference_mode() -> None:
    assert "Inference" not in str(selftest.problems(CPU, 5, size=4))


def test_the_test_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # it seeds GPUs too
    monkeypatch.setattr(torch, "manual_seed", pytest.fail)
    before = torch.get_rng_state()
    # without plans for this device, the network is compared with itself
    selftest.problems(CPU, 5, size=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_different_result_is_told() -> None:
    right: dict[str, Tensor | None] = {"a": torch.ones(3).double(), "b": None, "c": torch.ones(2).double()}
    ours: dict[str, Tensor | None] = {"a": torch.tensor([1.0, 1.0, 1.01]), "b": torch.ones(1), "c": None}
    found = list(selftest._differences(ours, right))
    assert found == ["a is 1.0e-02 off", "b is there, and should not be", "c is missing"]
    ours["a"] = torch.tensor([1.0, 1.0, torch.nan])
    assert "a is nan off" in selftest._differences(ours, right)


@pytest.mark.parametrize("problem", [None, "output is 1 off"])
def test_the_doctor_says_what_runs_plans(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(selftest, "problems", lambda device, width: [problem] if problem else [])
    here = replace(TRITON, why_not=lambda device: None)
    monkeypatch.setattr(region, "EXECUTORS", (NATIVE, here))
    rows = [row for row in region.plan_rows() if row.device == "cuda:0"]
    assert {row.implementation: row.used for row in rows} == {
        "triton": problem is None,
        "op by op": problem is not None,
    }
    reasons = {row.implementation: row.reason for row in rows}
    assert reasons["triton"] == "used" if problem is None else problem in reasons["triton"]
    assert reasons["op by op"] == ("triton comes first" if problem is None else "used")
