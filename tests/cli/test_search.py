"""`nascompile model.py` from start to end, on a model that trains in a second: what it writes, says and
repeats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nascompile.runtime import report
from nascompile.runtime.job import SearchJob
from tests.cli.conftest import FAST, TINY, CommandLine

FILES = [
    "architecture.json",
    "checkpoint/checkpoint.pt",
    "job.json",
    "lean.pt",
    "lean.pt2",
    "lean.safetensors",
    "plots/architecture.png",
    "plots/architecture.svg",
    "plots/decisions.png",
    "plots/retrain.png",
    "plots/search.png",
    "retrain/checkpoint.pt",
    "search.log",
    "summary.json",
]


def written(folder: str) -> list[str]:
    root = Path(folder)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def summary(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "summary.json").read_text())


def outcome(folder: str) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Weights, architecture and histories: all that has to be equal when two runs are."""
    told = summary(folder)
    return load_file(f"{folder}/lean.safetensors"), told["architecture"], (told["search"], told["retraining"])


def assert_same_outcome(left: str, right: str) -> None:
    weights, architecture, histories = outcome(left)
    other_weights, other_architecture, other_histories = outcome(right)
    assert architecture == other_architecture
    assert histories == other_histories
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """The test data of the tiny model file."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    return x, x[:, :3].argmax(1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time with the fewest repetitions, and draw nothing: for tests of everything else."""
    monkeypatch.setattr(report, "_SECONDS", 0.0)
    monkeypatch.setattr(SearchJob, "_draw", lambda *_: [])


def test_the_whole_line(cli: CommandLine, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    out = cli.good(cli.write(), "--out", "out", "--epochs", "2", "--retrain", "3", *FAST)
    assert written("out") == FILES
    told = summary("out")
    assert [record["epoch"] for record in told["search"]] == [0, 1]
    assert len(told["retraining"]) == 3
    # the table shows what the summary holds
    assert re.search(
        rf"parameters\s+{told['supernet']['parameters']:,}\s+{told['lean']['parameters']:,}", out
    )
    assert re.search(rf"test accuracy\s+\S+\s+{told['lean']['test']['accuracy']:.4f}", out)
    assert "written to out: architecture.json" in out
    # every default is said
    assert "CrossEntropyLoss" in out
    assert "top-1 accuracy" in out
    assert "learning rate 0.025" in out
    assert "the first batch of dataset_train" in out
    # the exported network has the weights and the test accuracy that were reported
    x, target = data
    network = torch.jit.load("out/lean.pt")
    assert (network(x).argmax(1) == target).float().mean().item() == pytest.approx(
        told["lean"]["test"]["accuracy"]
    )
    weights = load_file("out/lean.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == told["lean"]["parameters"]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name])
    program = torch.export.load("out/lean.pt2").module()
    torch.testing.assert_close(program(x), network(x))


@pytest.mark.usefixtures("quick")
def test_the_log_holds_settings_defaults_and_every_epoch(cli: CommandLine) -> None:
    cli.good(cli.write(), "--out", "out", "--epochs", "2", "--retrain", "1", *FAST)
    log = Path("out/search.log").read_text()
    for line in ('"method": "darts"', "loss: CrossEntropyLoss", "epoch 2/2", "retraining 1/1", "lean  {"):
        assert line in log, line


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["darts", "darts-unrolled", "enas", "random"])
def test_every_method_searches(cli: CommandLine, method: str) -> None:
    cli.good(
        cli.write(), "--out", "out", "--epochs", "1", "--method", method, "--format", "torchscript", *FAST
    )
    told = summary("out")
    assert told["settings"]["method"] == method
    assert set(told["architecture"]) == {"first", "second", "skip"}
    assert not Path("out/lean.pt2").exists()
    assert not Path("out/retrain").exists()


@pytest.mark.usefixtures("quick")
def test_without_retraining_the_weights_are_the_supernets(cli: CommandLine) -> None:
    cli.good(cli.write(), "--out", "out", "--epochs", "1", "--format", "torchscript", *FAST)
    state = torch.load("out/checkpoint/checkpoint.pt", weights_only=True)["model"]
    weights = load_file("out/lean.safetensors")
    assert torch.equal(weights["head.weight"], state["head.weight"])


@pytest.mark.usefixtures("quick")
def test_retraining_starts_from_fresh_weights_unless_told_to_inherit(cli: CommandLine) -> None:
    still = f"{TINY}\ndef optimizer(net): return torch.optim.SGD(net.parameters(), lr=0.0)\n"
    common = ("--epochs", "1", "--retrain", "1", "--format", "torchscript", *FAST)
    cli.good(cli.write(still), "--out", "fresh", *common)
    cli.good(cli.write(still), "--out", "inherited", "--inherit", *common)
    state = torch.load("inherited/checkpoint/checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(load_file("inherited/lean.safetensors")["head.weight"], state["head.weight"])
    assert not torch.equal(load_file("fresh/lean.safetensors")["head.weight"], state["head.weight"])


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_network_and_another_does_not(cli: CommandLine) -> None:
    common = ("--epochs", "1", "--retrain", "1", "--format", "torchscript", *FAST)
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        cli.good(cli.write(), "--out", folder, "--seed", seed, *common)
    assert_same_outcome("a", "b")
    assert outcome("a")[2] != outcome("c")[2]


@pytest.mark.usefixtures("quick")
def test_compiled_and_eager_find_the_same(cli: CommandLine) -> None:
    common = ("--epochs", "2", "--format", "torchscript", *FAST)
    cli.good(cli.write(), "--out", "compiled", *common)
    cli.good(cli.write(), "--out", "eager", "--no-compile", *common)
    compiled, eager = summary("compiled"), summary("eager")
    assert compiled["architecture"] == eager["architecture"]
    for left, right in zip(compiled["search"], eager["search"], strict=True):
        assert left == pytest.approx(right, abs=1e-4)


@pytest.mark.usefixtures("quick")
def test_quiet_prints_the_table_only(cli: CommandLine) -> None:
    out = cli.good(cli.write(), "--out", "out", "--epochs", "1", "--format", "torchscript", "--quiet", *FAST)
    assert out.strip().splitlines()[0].split() == ["supernet", "lean"]
    assert "CrossEntropyLoss" not in out


@pytest.mark.usefixtures("quick")
def test_the_default_folder_is_named_after_the_file(cli: CommandLine) -> None:
    cli.good(cli.write(), "--epochs", "1", "--format", "torchscript", *FAST)
    assert Path("runs/net/architecture.json").is_file()


@pytest.mark.usefixtures("quick")
def test_a_second_run_needs_resume_or_overwrite(cli: CommandLine) -> None:
    common = (cli.write(), "--out", "out", "--format", "torchscript")
    cli.good(*common, "--epochs", "1", *FAST)
    Path("out/notes.txt").write_text("mine")
    assert "continue it with --resume, start anew with --overwrite, or choose" in cli.bad(
        *common, "--epochs", "2"
    )
    cli.good(*common, "--epochs", "2", "--overwrite", *FAST)
    assert len(summary("out")["search"]) == 2
    assert Path("out/notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("quick")
def test_a_searched_run_can_be_continued_with_more_epochs_and_retraining(cli: CommandLine) -> None:
    path = cli.write()
    cli.good(path, "--out", "whole", "--epochs", "3", "--retrain", "2", *FAST)
    cli.good(path, "--out", "parts", "--epochs", "1", *FAST)
    cli.good(path, "--out", "parts", "--resume", "--epochs", "3")
    out = cli.good(path, "--out", "parts", "--resume", "--retrain", "2")
    assert "continuing after epoch 3 of 3" in out
    assert_same_outcome("whole", "parts")
    # nothing is left to do, and nothing changes
    cli.good(path, "--out", "parts", "--resume")
    assert_same_outcome("whole", "parts")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--method", "enas"), r"continues a run with --method darts; --method enas would be another run"),
        (("--seed", "5"), r"--seed 0; --seed 5 would be another run"),
        (("--no-compile",), r"continues a run with compilation; no compilation would be another run"),
        (("--epochs", "1"), r"epochs is 1, but this run has done 2"),
    ],
)
def test_what_may_not_change_on_resuming(cli: CommandLine, args: tuple[str, ...], says: str) -> None:
    path = cli.write()
    cli.good(path, "--out", "out", "--epochs", "2", "--format", "torchscript", *FAST)
    line = cli.bad(path, "--out", "out", "--resume", *args)
    assert re.search(says, line), line


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("part", ["checkpoint", "retrain"])
@pytest.mark.parametrize("how", ["cut short", "bits flipped"])
def test_a_damaged_checkpoint_is_one_line(cli: CommandLine, part: str, how: str) -> None:
    path = cli.write()
    cli.good(path, "--out", "out", "--epochs", "1", "--retrain", "1", "--format", "torchscript", *FAST)
    file = Path(f"out/{part}/checkpoint.pt")
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    if how == "cut short":
        del content[half:]
    else:
        # wide enough to hit more than the padding between two tensors
        for index in range(half - 200, half + 200):
            content[index] ^= 1
    file.write_bytes(content)
    assert re.search(
        r"checkpoint 'out/.*checkpoint\.pt' is damaged", cli.bad(path, "--out", "out", "--resume")
    )


@pytest.mark.usefixtures("quick")
def test_damaged_settings_are_one_line(cli: CommandLine) -> None:
    path = cli.write()
    cli.good(path, "--out", "out", "--epochs", "1", "--format", "torchscript", *FAST)
    Path("out/job.json").write_text("{")
    assert "job.json is damaged" in cli.bad(path, "--out", "out", "--resume")
    Path("out/job.json").write_text('{"settings": {"epochs": "three"}}')
    assert "'epochs' is 'three'" in cli.bad(path, "--out", "out", "--resume")


@pytest.mark.usefixtures("quick")
def test_the_checkpoint_of_another_model_is_one_line(cli: CommandLine) -> None:
    cli.good(cli.write(), "--out", "out", "--epochs", "1", "--format", "torchscript", *FAST)
    wider = TINY.replace("(8, 3)", "(8, 4)")
    line = cli.bad(cli.write(wider), "--out", "out", "--resume")
    assert re.search(r"does not fit: the model: 'head\.weight' has shape \(4, 8\)", line), line


@pytest.mark.usefixtures("quick")
def test_batches_may_be_dicts_and_outputs_may_have_auxiliary_logits(cli: CommandLine) -> None:
    text = TINY.replace(
        "    return TensorDataset(x, x[:, :3].argmax(1))",
        "    return [{'x': row, 'target': row[:3].argmax()} for row in x]",
    ).replace("return self.head(y if old is None else y + old)", "z = self.head(y); return z, z")
    cli.good(
        cli.write(text), "--out", "out", "--epochs", "1", "--retrain", "1", "--format", "torchscript", *FAST
    )


@pytest.mark.usefixtures("quick")
def test_the_job_splits_the_training_data_when_there_is_no_validation_data(cli: CommandLine) -> None:
    text = f"{TINY}\ndel dataset_valid, dataset_test\n"
    out = cli.good(cli.write(text), "--out", "out", "--epochs", "1", "--format", "torchscript", *FAST)
    assert "no dataset_valid: 6 of the 64 training samples are kept for validation" in out
    assert "58 train · 6 validation" in out
    assert summary("out")["lean"]["test"] is None
    assert "test accuracy" not in out
