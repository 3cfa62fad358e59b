"""The benchmarks of this repository: which rows run, and that a small population runs through."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import population, run


def test_rows_go_to_the_suites_that_have_them() -> None:
    chosen = run.choose("mbconv,darts", ["spaces", "population"], small=False)
    assert chosen == {"spaces": ["mbconv"], "population": ["mbconv", "darts"]}
    assert run.choose(None, ["spaces"], small=False) == {"spaces": None, "population": None}
    with pytest.raises(ValueError, match="unknown row 'darts'; rows of spaces: darts16, darts64, "):
        run.choose("darts", ["spaces"], small=False)
    with pytest.raises(ValueError, match="unknown row 'darts64'; rows of spaces: darts16, darts16-second"):
        run.choose("darts64", ["spaces"], small=True)


def test_a_small_population(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "keep_memory", lambda: None)
    arguments = "run.py --suite population --rows darts --small --threads 1 --out"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), str(tmp_path)])
    assert run.main() == 0
    with (tmp_path / "cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["name"] for line in lines} == {"DARTS"}
    assert {line["case"] for line in lines} == {f"{population.SMALL.members} architectures"}
    assert [bool(line["ratio"]) for line in lines] == [True, True, False, False]
