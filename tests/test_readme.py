"""The README's examples do what it says about them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.repository import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_model_is_pruned_counted_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # as a file of its own: tracing reads the source of a model's forward where there is one
    file = tmp_path / "readme.py"
    file.write_text(BLOCKS[0] + BLOCKS[1])
    names: dict = {"__name__": "readme"}
    exec(compile(file.read_text(), str(file), "exec"), names)
    stem, conv, head = 16 * 9 + 16, 16 * 16 * 9 + 16, 16 * 10 + 10
    parameters = sum(p.numel() for p in names["lean"].parameters())
    assert parameters == stem + conv + head
    assert re.search(rf"\b{parameters}\b", capsys.readouterr().out.replace(",", ""))
    loaded = torch.export.load(tmp_path / "lean.pt2").module()
    batch = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(loaded(batch), names["lean"].eval()(batch))


def test_imports_for_those_who_come_from_nni() -> None:
    names: dict = {}
    exec(BLOCKS[2], names)
    assert {"mutables", "DartsTrainer", "apply_fixed_architecture"} <= names.keys()
