"""`nascompile bench`: ratios for right results, none for wrong ones, time limits, bad options."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from nascompile import cli_bench
from nascompile.runtime.bench_report import Report, Row
from tests.cli.conftest import CommandLine

MODEL = """
import os, time
import torch
from torch import nn
from nascompile.mutables import LayerChoice

# every peer compiles into a folder of its own
PEER = os.path.basename(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.op = LayerChoice([nn.Conv2d(3, 4, k, padding=k // 2) for k in (1, 3)], key="op")
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.head(self.op(x).relu().mean((2, 3)))
        SLEEP
        return y * SCALE


model = Net
example_inputs = torch.randn(2, 3, 5, 5)
"""
SHORT = ("--seconds", "0.1", "--device", "cpu", "--threads", "1")


def write(cli: CommandLine, *, scale: str = "1.0", sleep: str = "") -> Path:
    """The model file, with what it does in the process of one peer."""
    return cli.write(MODEL.replace("SCALE", scale).replace("SLEEP", sleep))


def table() -> dict[str, dict[str, str]]:
    """The rows of the CSV by peer."""
    with Path("out/bench.csv").open() as file:
        return {row["peer"]: row for row in csv.DictReader(file)}


def test_right_results_give_ratios(cli: CommandLine) -> None:
    out = cli.good("bench", write(cli), *SHORT, "--peers", "eager,nascompile", "--out", "out")
    rows = table()
    assert float(rows["nascompile"]["speed"]) > 0
    assert float(rows["eager"]["speed"]) == 1.0
    assert re.search(r"nascompile .*\dx", out)
    assert Path("out/bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("out").iterdir()) == ["bench.csv", "bench.png"]
    assert "WRONG" not in out
    assert "the mean square of the output" in out


def test_a_wrong_result_gives_no_ratio_and_a_slow_peer_is_stopped(cli: CommandLine) -> None:
    path = write(
        cli,
        scale="(1.001 if PEER == 'nascompile' else 1.0)",
        sleep="PEER == 'eager-channels-last' and time.sleep(60)",
    )
    peers = "eager,eager-channels-last,nascompile"
    result = cli("bench", path, *SHORT, "--peers", peers, "--compile-limit", "2", "--out", "out")
    assert result.code == 1, result.err
    assert "WRONG, no ratios: output: relative error 0.001" in result.out
    assert "stopped after 2 s" in result.out
    rows = table()
    assert all(row["speed"] == row["memory_ratio"] == "" for row in rows.values())
    assert rows["eager-channels-last"]["median_ms"] == ""
    assert float(rows["nascompile"]["median_ms"]) > 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--peers", "eager,tensorrt"), "unknown peer 'tensorrt'; known: eager, "),
        (("--peers", ","), "--peers is ','"),
        (("--seconds", "0"), "seconds is 0, expected a positive number"),
        (("--compile-limit", "nan"), "compile-limit is nan"),
        (("--batch-size", "0"), "batch-size is 0, expected at least 1"),
        (("--threads", "0"), "threads is 0, expected at least 1"),
        (("--device", "tpu"), "device is 'tpu', expected one of: auto, cpu, cuda"),
        (("--out", "net.py"), "output folder 'net.py' is a file"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    cli: CommandLine, options: tuple[Any, ...], problem: str
) -> None:
    assert problem in cli.bad("bench", write(cli), *options)


def test_a_model_that_cannot_be_compared_is_refused(cli: CommandLine) -> None:
    path = write(cli, scale="torch.rand(())")
    assert "draws random numbers in train mode" in cli.bad("bench", path, *SHORT)
    path.write_text("model = 1")
    assert "'model' is a int" in cli.bad("bench", path, *SHORT)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a table with long words in all columns."""
    rows = [
        Row("eager-channels-last", 1234.5, 123456.0, 123450.0, 123460.0, 12345.6),
        Row("nascompile", 1234.5, 12345.0, 12340.0, 12350.0, 1234.5),
        Row("torch.compile", note="stopped after 120 s", failed=True),
    ]
    report = Report("a model", rows, [], 3e9, 1e12, "a machine", "soft")
    cli_bench._show(cli_bench._console(), report)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_in_a_pipe_nothing_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = shown(capsys)
    (eager,) = [line for line in lines if "channels-last" in line]
    assert eager.split() == [
        "eager-channels-last",
        *("1234.5", "s", "1.235e+05", "1.23e+05-1.23e+05", "1.00x", "12345.6", "1.00x", "0%"),
    ]
    assert any(line.endswith("stopped after 120 s") for line in lines)
    monkeypatch.setenv("COLUMNS", "60")
    narrow = shown(capsys)
    assert max(map(len, narrow)) <= 60
    assert not any("stopped after 120 s" in line for line in narrow)
