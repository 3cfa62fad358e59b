"""The commands beside the search: explain, draw, space, count, prune, export, doctor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nascompile.compiler.prune import prune
from nascompile.kernels import native
from tests.cli.conftest import TINY, CommandLine

ARCHITECTURE = {"first": 0, "second": 1, "skip": 0}
# first.0 and head; second is the identity
PARAMETERS = 6 * 8 + 8 + 8 * 3 + 3
FLOPS = 2 * (6 * 8 + 8 * 3)


@pytest.fixture
def architecture(cli: CommandLine) -> Path:
    """An architecture of the tiny model."""
    path = cli.folder / "arc.json"
    path.write_text(json.dumps(ARCHITECTURE))
    return path


def test_explain_names_every_choice_and_candidate_cost(cli: CommandLine) -> None:
    out = cli.good("explain", cli.write())
    for key in ARCHITECTURE:
        assert key in out


def test_explain_json_is_json(cli: CommandLine) -> None:
    assert "first" in json.dumps(json.loads(cli.good("explain", cli.write(), "--json")))


IMAGES = """
import torch
from torch import nn
from nascompile.mutables import LayerChoice

def model():
    layers = [nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)), nn.MaxPool2d(3, 1, 1)]
    return nn.Sequential(LayerChoice(layers, key="one"), nn.BatchNorm2d(4))

example_inputs = torch.randn(3, 4, 6, 6)
"""


@pytest.mark.skipif(native.load()[0] is None, reason="needs the C++ extension")
def test_explain_measures_choices(cli: CommandLine) -> None:
    path = cli.write(IMAGES)
    predicted = cli.good("explain", path)
    assert "a batch of 3" in predicted
    assert "predicted" in predicted
    assert "measured" not in predicted
    measured = cli.good("explain", path, "--measure", "--batch-size", "5", "--all")
    assert "a batch of 5" in measured
    assert "measured" in measured
    assert "a whole step" in measured
    (edge,) = json.loads(cli.good("explain", path, "--json"))["edges"]["edges"]
    assert edge["key"] == "one"
    assert edge["predicted"]["plan"] > 0


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_draw_writes_a_picture(cli: CommandLine, architecture: Path, suffix: str) -> None:
    cli.good("draw", cli.write(), "-o", f"space{suffix}")
    cli.good("draw", cli.write(), "-o", f"chosen{suffix}", "-a", architecture)
    magic = b"\x89PNG" if suffix == ".png" else b"<?xml"
    plain, chosen = Path(f"space{suffix}").read_bytes(), Path(f"chosen{suffix}").read_bytes()
    assert plain.startswith(magic)
    assert chosen.startswith(magic)
    assert plain != chosen


def test_space_is_nnis_json(cli: CommandLine) -> None:
    expected = {
        "first": {"_type": "layer_choice", "_value": ["0", "1"]},
        "second": {"_type": "layer_choice", "_value": ["0", "1"]},
        "skip": {"_type": "input_choice", "_value": {"candidates": [""], "n_chosen": None}},
    }
    assert json.loads(cli.good("space", cli.write())) == expected
    cli.good("space", cli.write(), "-o", "space.json")
    assert json.loads(Path("space.json").read_text()) == expected


def test_count_of_supernet_and_architecture(cli: CommandLine, architecture: Path) -> None:
    counts = json.loads(cli.good("count", cli.write(), "-a", architecture, "--json"))
    assert counts["lean"] == {"parameters": PARAMETERS, "flops": FLOPS}
    assert counts["supernet"]["parameters"] == PARAMETERS + 6 * 8 + 8 + 8 * 8 + 8
    out = cli.good("count", cli.write(), "-a", architecture)
    assert re.search(rf"lean: {PARAMETERS} parameters, {FLOPS} FLOPs", out)


def test_prune_inherits_the_weights_of_supernet_or_lean_network(cli: CommandLine, architecture: Path) -> None:
    path = cli.write(f"{TINY}\ntorch.manual_seed(5)\nmodel = Net()\n")
    out = cli.good("prune", path, architecture, "-o", "lean.safetensors", "--code")
    assert "def forward(self, x)" in out
    lean = load_file("lean.safetensors")
    assert sum(tensor.numel() for tensor in lean.values()) == PARAMETERS
    # the weights of a lean network, and of a supernet, come back out
    changed = {name: tensor + 1 for name, tensor in lean.items()}
    save_file(changed, "changed.safetensors")
    cli.good("prune", path, architecture, "-o", "again.safetensors", "--weights", "changed.safetensors")
    assert all(torch.equal(load_file("again.safetensors")[name], tensor) for name, tensor in changed.items())


def test_prune_takes_the_weights_of_a_supernet(cli: CommandLine, architecture: Path) -> None:
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec(TINY, namespace)
    supernet = namespace["Net"]()
    save_file(dict(supernet.state_dict()), "supernet.safetensors")
    cli.good(
        "prune", cli.write(), architecture, "-o", "lean.safetensors", "--weights", "supernet.safetensors"
    )
    expected = prune(supernet, ARCHITECTURE, torch.zeros(1, 6)).state_dict()
    found = load_file("lean.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_export_by_suffix(cli: CommandLine, architecture: Path, suffix: str) -> None:
    path = cli.write(f"{TINY}\ntorch.manual_seed(5)\nmodel = Net()\n")
    cli.good("prune", path, architecture)
    cli.good("export", path, architecture, "-o", f"new/lean{suffix}", "--weights", "lean.safetensors")
    file = f"new/lean{suffix}"
    network = torch.jit.load(file) if suffix == ".pt" else torch.export.load(file).module()
    x = torch.randn(5, 6)
    weights = load_file("lean.safetensors")
    hidden = torch.nn.functional.linear(x, weights["first.weight"], weights["first.bias"])
    expected = torch.nn.functional.linear(2 * hidden, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(network(x), expected)


def test_doctor_reports_every_implementation(cli: CommandLine) -> None:
    from nascompile.kernels import ALL

    findings = json.loads(cli.good("doctor", "--json"))
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["devices"]["cpu"]
    cpu = [row for row in findings["operations"] if row["device"] == "cpu"]
    for kernel in ALL:
        rows = [row for row in cpu if row["operation"] == kernel.name]
        assert [row["implementation"] for row in rows] == [found.name for found in kernel.implementations]
        assert sum(row["used"] for row in rows) == 1
        assert all(row["reason"] for row in rows)
    plans = [row for row in cpu if row["operation"] == "plans"]
    assert [row["implementation"] for row in plans] == ["native", "op by op"]
    assert sum(row["used"] for row in plans) == 1
    out = cli.good("doctor")
    for word in ("versions", "devices", "operations", torch.__version__, ALL[0].name):
        assert word in out
