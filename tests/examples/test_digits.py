"""The demo: searched, pruned, retrained and exported, on a setting short enough for every test run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nascompile.cli import run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits.py"


@pytest.mark.slow
def test_the_demo_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = run([str(EXAMPLE), "--out", str(out), "--epochs", "2", "--retrain", "8", "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    told = json.loads((out / "summary.json").read_text())
    assert told["lean"]["test"]["accuracy"] > 0.95
    assert f"{told['lean']['test']['accuracy']:.4f}" in captured.out
    weights = load_file(out / "lean.safetensors")
    trained = sum(
        tensor.numel() for name, tensor in weights.items() if "running" not in name and "num_" not in name
    )
    assert trained == told["lean"]["parameters"] < told["supernet"]["parameters"]
    assert torch.jit.load(out / "lean.pt")(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
