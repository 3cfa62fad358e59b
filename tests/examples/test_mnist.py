"""The MNIST example from search to retraining, on images made here that a small network separates."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nascompile.mutables import InputChoice, LayerChoice
from tests.spaces.eager import RandomDecisions, decide, used_parameters

FILE = Path(__file__).resolve().parents[2] / "examples" / "mnist.py"


def write_mnist(folder: Path, prefix: str, count: int) -> None:
    """Class d is a bright bar in rows 2d + 4 and 2d + 5, under noise; labels in order."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 6] = 255
    for name, array in (
        (f"{prefix}-images-idx3-ubyte.gz", images),
        (f"{prefix}-labels-idx1-ubyte.gz", labels),
    ):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(FILE))


def run(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["mnist.py", *arguments])
    example["main"]()


def test_search_export_fix_retrain(
    example: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_mnist(tmp_path, "train", 400)
    write_mnist(tmp_path, "t10k", 50)
    architecture = tmp_path / "architecture.json"
    run(example, monkeypatch, "--data", str(tmp_path), "--epochs", "2", "--architecture", str(architecture))
    assert set(json.loads(architecture.read_text())) == {"LayerChoice1", "LayerChoice2", "InputChoice3"}
    printed = capsys.readouterr().out
    found = re.search(r"^test accuracy (\d\.\d+)$", printed, re.MULTILINE)
    assert found is not None, printed
    # chance is 0.1
    assert float(found.group(1)) > 0.5


def test_without_training_files_the_test_images_are_split(
    example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path, "t10k", 60)
    train, test = example["load"](tmp_path, None)
    assert "no training files" in capsys.readouterr().out
    assert (len(train), len(test)) == (50, 10)
    train, test = example["load"](tmp_path, 20)
    assert (len(train), len(test)) == (20, 4)


def test_digits_without_data(example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the data comes from scikit-learn")
    train, test = example["load"](None, 100)
    assert "scikit-learn" in capsys.readouterr().out
    image, label = train[0]
    assert image.shape == (1, 28, 28)
    assert 0 <= image.min() <= image.max() <= 1
    assert label.dtype == torch.int64
    assert (len(train), len(test)) == (100, 20)


@pytest.mark.parametrize("kernel", [0, 1])
def test_net(example: dict[str, Any], kernel: int) -> None:
    model = example["Net"]()
    reader = RandomDecisions(model)
    kinds = {key: type(choice) for key, choice in reader.choices_by_key.items()}
    assert list(kinds.values()) == [LayerChoice, LayerChoice, InputChoice]
    reader.release()
    chosen: dict = {key: kernel if kind is LayerChoice else [] for key, kind in kinds.items()}
    mutator = decide(model, chosen)
    k = 9 if kernel == 0 else 25
    convolutions = (1 * k + 1) * 32 + (32 * k + 1) * 32 + (32 * 9 + 1) * 64
    linear = (64 * 49 + 1) * 128 + (128 + 1) * 10
    x = torch.randn(2, 1, 28, 28)
    assert used_parameters(model, x) == convolutions + 2 * 32 + linear
    without = model.eval()(x)
    mutator.decide({**mutator.decision, "InputChoice3": torch.tensor([True])})
    assert not torch.equal(model(x), without)
