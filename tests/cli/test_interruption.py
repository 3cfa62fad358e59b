"""Ctrl-C and a full disk: both leave a folder that --resume continues, to the same network as without
them."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from nascompile.runtime import report
from nascompile.runtime.job import SearchJob
from tests.cli.conftest import FAST, TINY, CommandLine, command
from tests.cli.test_search import assert_same_outcome, summary

# the process interrupts itself at a chosen call of the metrics: at the same place every time
INTERRUPTED = f"""{TINY}
import os, signal
calls = 0


def metrics(output, target):
    global calls
    calls += 1
    if calls == int(os.environ.get("INTERRUPT_AT", 0)):
        os.kill(os.getpid(), signal.SIGINT)
    return {{"accuracy": (output.argmax(1) == target).float().mean().item()}}
"""

# two search epochs of 2 training and 2 validation batches, then retraining epochs of 4 and 2
FIRST_EPOCH, SECOND_EPOCH, SECOND_RETRAINING = 2, 6, 4 + 4 + 6 + 3
LENGTHS = ("--epochs", "2", "--retrain", "2", "--format", "torchscript", *FAST)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time with the fewest repetitions, and draw nothing."""
    monkeypatch.setattr(report, "_SECONDS", 0.0)
    monkeypatch.setattr(SearchJob, "_draw", lambda *_: [])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("call", "epochs"), [(FIRST_EPOCH, 0), (SECOND_EPOCH, 1), (SECOND_RETRAINING, 2)])
def test_an_interrupted_run_resumes_to_the_same_network(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, call: int, epochs: int
) -> None:
    path = cli.write(INTERRUPTED)
    cli.good(path, "--out", "whole", *LENGTHS)
    monkeypatch.setenv("INTERRUPT_AT", str(call))
    result = cli(path, "--out", "parts", *LENGTHS)
    assert result.code == 130
    assert result.err == f"nascompile: interrupted; continue with: nascompile {path} --out parts --resume\n"
    assert not Path("parts/summary.json").exists()
    monkeypatch.delenv("INTERRUPT_AT")
    out = cli.good(path, "--out", "parts", "--resume")
    if epochs:
        assert f"continuing after epoch {epochs} of 2" in out
    assert len(summary("parts")["search"]) == 2
    assert_same_outcome("whole", "parts")


def test_ctrl_c_in_a_process_of_its_own(cli: CommandLine, process_environment: dict[str, str]) -> None:
    path = cli.write(INTERRUPTED)
    environment = {**process_environment, "INTERRUPT_AT": str(SECOND_EPOCH)}
    process = subprocess.run(
        command(path, "--out", "out", *LENGTHS), env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 130
    assert process.stderr.splitlines() == [
        f"nascompile: interrupted; continue with: nascompile {path} --out out --resume"
    ]
    assert Path("out/checkpoint/checkpoint.pt").is_file()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name",
    [
        "job.json",
        "checkpoint/checkpoint.pt",
        "architecture.json",
        "retrain/checkpoint.pt",
        "lean.safetensors",
        "lean.pt",
        "summary.json",
    ],
)
def test_a_full_disk_is_one_line_and_the_run_can_be_continued(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = cli.write()
    replace = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = cli.bad(path, "--out", "parts", *LENGTHS)
    assert re.search(rf"parts/{re.escape(name)}.*No space left on device", line), line
    if name == "job.json":
        assert os.listdir("parts") == []
        return
    assert f"make room, then continue with: nascompile {path} --out parts --resume" in line
    cli.good(path, "--out", "parts", "--resume")
    cli.good(path, "--out", "whole", *LENGTHS)
    assert_same_outcome("whole", "parts")
    assert not [found for found in Path("parts").rglob("*") if "partial" in found.name]


@pytest.mark.parametrize("limit", [2_000, 9_000])
def test_a_write_that_the_system_refuses_is_one_line(
    cli: CommandLine, process_environment: dict[str, str], limit: int
) -> None:
    # a limit on the size of files: torch's own writers meet it as well, in C++
    process = subprocess.run(
        command(cli.write(), "--out", "out", *LENGTHS),
        env=process_environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert re.search(r"cannot (be written|write).*make room, then continue with", process.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_into_a_full_device_is_one_line(cli: CommandLine, process_environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command("space", cli.write()),
            env=process_environment,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert process.returncode == 2
    # depending on its length the output is written at once or when the process ends
    assert re.fullmatch(rb"nascompile: cannot write.*: No space left on device\n", process.stderr)


def test_a_reader_that_leaves_early_is_no_error(
    cli: CommandLine, process_environment: dict[str, str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        command("space", cli.write()),
        env=process_environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert process.returncode == 1
    assert process.stderr == b""


def test_nothing_in_a_run_folder_can_run_code(cli: CommandLine) -> None:
    import torch

    cli.good(cli.write(), "--out", "out", *LENGTHS)
    for file in Path("out").rglob("checkpoint.pt"):
        torch.load(file, weights_only=True)
    assert not [file for file in Path("out").rglob("*") if file.suffix in (".pkl", ".pickle", ".pth", ".tar")]
