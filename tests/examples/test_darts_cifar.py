"""The DARTS example as a model file: what it defines fits together, from real files and without."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nascompile import NascompileError
from nascompile.spaces import DartsNetwork
from tests.spaces.eager import RandomDecisions

FILE = Path(__file__).resolve().parents[2] / "examples" / "darts_cifar.py"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("NASCOMPILE_CIFAR10", raising=False)
    for name, value in {"CELLS": 3, "CHANNELS": 4, "IMAGES": 40}.items():
        monkeypatch.setenv(f"NASCOMPILE_{name}", str(value))
    return monkeypatch


def load() -> dict[str, Any]:
    return runpy.run_path(str(FILE))


def test_default_is_the_size_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELLS", "CHANNELS"):
        monkeypatch.delenv(f"NASCOMPILE_{name}", raising=False)
    model = load()["model"]()
    assert isinstance(model, DartsNetwork)
    assert len(model.cells) == 8
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in DartsNetwork(32, 3, 16, 10, 8, 4).parameters()
    )


def test_one_step_on_made_up_images(small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = load()
    train, valid = file["dataset_train"](), file["dataset_valid"]()
    assert capsys.readouterr().out.count("made-up") == 1
    assert (len(train), len(valid)) == (36, 4)
    assert {label.item() for _, label in train} == set(range(10))
    model = file["model"]()
    mutator = RandomDecisions(model)
    mutator.reset()
    assert model(file["example_inputs"]()).shape == (2, 10)
    images, labels = (torch.stack(column) for column in zip(*(train[i] for i in range(8)), strict=True))
    before = [p.clone() for p in model.parameters()]
    optimizer = file["optimizer"](model)
    logits = model(images)
    file["loss"](logits, labels).backward()
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    one_hot = torch.eye(10)[labels]
    assert file["metrics"](one_hot, labels) == {"accuracy": 1.0}
    assert file["metrics"](-one_hot, labels) == {"accuracy": 0.0}


def test_real_files(small: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = np.random.default_rng(0).integers(0, 256, (40, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(40) % 10
    (tmp_path / "data_batch_1.bin").write_bytes(records.tobytes())
    small.setenv("NASCOMPILE_CIFAR10", str(tmp_path))
    file = load()
    valid = file["dataset_valid"]()
    assert f"40 images of CIFAR-10 from {tmp_path}" in capsys.readouterr().out
    assert [label.item() for _, label in valid] == [6, 7, 8, 9]


def test_bad_number(small: pytest.MonkeyPatch) -> None:
    small.setenv("NASCOMPILE_CELLS", "eight")
    with pytest.raises(NascompileError, match="NASCOMPILE_CELLS is 'eight', expected a whole number"):
        load()["model"]()
