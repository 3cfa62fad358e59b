"""Every format agrees with the module for any batch size, and loads where nascompile cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.export import ExportError, export
from nascompile.compiler.measure import count
from nascompile.compiler.mutables import LayerChoice
from nascompile.compiler.prune import prune

FORMATS = {"torchscript": ".pt", "pt2": ".pt2", "onnx": ".onnx"}


class Supernet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2)], key="op")
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.op(x)).relu()
        return self.head(self.drop(x.mean((2, 3)).view(x.size(0), -1)))


X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))

ELSEWHERE = """
import sys
sys.modules["nascompile"] = None  # importing it raises ImportError
import onnxruntime
import torch
x, expected = torch.load("data.pth", weights_only=True)
session = onnxruntime.InferenceSession("net.onnx")
name = session.get_inputs()[0].name
loaded = {
    "torchscript": torch.jit.load("net.pt"),
    "pt2": torch.export.load("net.pt2").module(),
    "onnx": lambda x: torch.as_tensor(session.run(None, {name: x.numpy()})[0]),
}
for format, module in loaded.items():
    for batch in (1, 2, 3):
        torch.testing.assert_close(module(x[:batch]), expected[:batch], rtol=1e-4, atol=1e-5)
    print(format)
try:
    import nascompile
except ImportError:
    print("alone")
"""


def test_the_files_of_a_pruned_network_load_without_nascompile(tmp_path: Path):
    lean = prune(Supernet(), {"op": 1}, X)
    lean.train()
    for suffix in FORMATS.values():
        assert export(lean, tmp_path / f"net{suffix}", X) == tmp_path / f"net{suffix}"
    assert lean.training
    assert lean.norm.training  # type: ignore[union-attr]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.pt", "net.pt2"]
    lean.eval()
    torch.save((X, lean(X).detach()), tmp_path / "data.pth")
    command = [sys.executable, "-c", ELSEWHERE]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [*FORMATS, "alone"]


class Tree(nn.Module):
    def forward(self, batch: dict[str, Tensor], pair: tuple[Tensor, list[Tensor]]) -> dict[str, Tensor]:
        return {"sum": batch["a"] + pair[0], "scaled": batch["b"] * pair[1][0]}


@pytest.mark.parametrize("format", FORMATS)
def test_nested_inputs_and_outputs(format: str, tmp_path: Path):
    table = torch.arange(4.0)
    inputs = ({"a": torch.ones(3, 4), "b": torch.ones(3, 4)}, (torch.ones(3, 4), [table]))
    assert export(Tree(), tmp_path / "tree", inputs, format=format).is_file()


def test_a_batch_of_one_is_dynamic_too(tmp_path: Path):
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval()
    loaded = torch.export.load(export(net, tmp_path / "net.pt2", torch.ones(1, 4))).module()
    assert torch.equal(loaded(torch.ones(5, 4)), net(torch.ones(5, 4)))


class Unscriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = {"a": 2.0}
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *rest):
        return self.linear(x) * sum(value for value in self.layers.values())


def test_what_cannot_be_scripted_is_traced(tmp_path: Path):
    net = Unscriptable().eval()
    loaded = torch.jit.load(export(net, tmp_path / "net.ts", torch.ones(2, 4)))
    assert torch.equal(loaded(torch.ones(3, 4)), net(torch.ones(3, 4)))


class Untyped(nn.Module):
    def forward(self, pair):
        return pair[0] + 2 * pair[1]


def test_what_is_scripted_for_tensors_but_called_with_lists_is_traced(tmp_path: Path):
    pair = [torch.ones(2, 4), torch.ones(2, 4)]
    loaded = torch.jit.load(export(Untyped(), tmp_path / "net.ts", (pair,)))
    assert torch.equal(loaded([torch.ones(3, 4), torch.ones(3, 4)]), 3 * torch.ones(3, 4))


class Baked(nn.Module):
    """Remembers the batch size of the first call: exactly what a trace does."""

    def forward(self, x, *rest):
        return x + torch.ones(int(x.shape[0]), 1).cumsum(0) * len({1: 2})


class Rigid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 2, 2)


@pytest.mark.parametrize("format", FORMATS)
def test_a_module_for_one_batch_size_only_is_refused(format: str, tmp_path: Path):
    with pytest.raises(ExportError, match="does not run with batch size 3: RuntimeError"):
        export(Rigid(), tmp_path / "net", torch.ones(2, 4), format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_size_that_the_trace_bakes_in_is_found(tmp_path: Path):
    with pytest.raises(ExportError, match=r"torchscript: .* batch size 3"):
        export(Baked(), tmp_path / "net.pt", torch.ones(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_disagrees_is_refused_and_the_old_one_kept(tmp_path: Path):
    class Wanders(nn.Module):
        def forward(self, x, *rest):
            return x + torch.rand(())

    target = tmp_path / "net.pt"
    target.write_bytes(b"old")
    with pytest.raises(ExportError, match="output 0 differs with batch size 2: largest error"):
        export(Wanders(), target, torch.ones(2, 4))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_choices_are_named():
    with pytest.raises(ExportError, match=r"still holds choices: 'op'; .*prune"):
        export(Supernet(), "net.pt", X)


def test_formats_and_folders_are_named(tmp_path: Path):
    net = nn.Linear(4, 4)
    with pytest.raises(ExportError, match=r"'net.bin' has the suffix '.bin'; known: .pt \(torchscript\)"):
        export(net, "net.bin", torch.ones(1, 4))
    with pytest.raises(ExportError, match="format is 'tflite', expected one of: torchscript, pt2, onnx"):
        export(net, "net.bin", torch.ones(1, 4), format="tflite")
    with pytest.raises(ExportError, match="does not exist"):
        export(net, tmp_path / "none" / "net.pt", torch.ones(1, 4))
    with pytest.raises(ExportError, match="no tensor with a batch dimension"):
        export(net, tmp_path / "net.pt", (2.0, torch.ones(())))
    with pytest.raises(NascompileError, match="weight"):
        export(nn.LazyLinear(3), tmp_path / "net.pt", torch.ones(1, 4))


class Point(NamedTuple):
    x: Tensor
    name: str


def test_inputs_that_a_format_cannot_take(tmp_path: Path):
    class Named(nn.Module):
        def forward(self, point, *rest):
            return point.x * len(point.name)

    with pytest.raises(ExportError, match="torchscript: can neither be scripted"):
        export(Named(), tmp_path / "net.pt", (Point(torch.ones(2, 4), "abc"),))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ExportError, match=rf"package '{package}' is missing; pip install 'nascompile\[onnx\]'"
    ):
        export(nn.Linear(4, 4), tmp_path / "net.onnx", torch.ones(1, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_operators_of_nascompile_are_refused(format: str, tmp_path: Path):
    library = torch.library.Library("nascompile", "FRAGMENT")
    try:
        library.define("for_the_export_test(Tensor x) -> Tensor")
        library.impl("for_the_export_test", lambda x: x + 1, "CompositeExplicitAutograd")
        library.impl("for_the_export_test", lambda x: torch.empty_like(x), "Meta")

        class Own(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.nascompile.for_the_export_test(x)

        with pytest.raises(ExportError, match="operators of nascompile"):
            export(Own(), tmp_path / "net", torch.ones(2, 4), format=format)
    finally:
        library._destroy()


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.jit, "save", full)
    with pytest.raises(ExportError, match=r"cannot write to .*No space left"):
        export(nn.Linear(4, 4), tmp_path / "net.pt", torch.ones(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_count_with_an_architecture_is_the_count_of_the_pruned_network():
    # the convolution, the normalisation's weight and bias, the head
    parameters = 4 * 3 * 25 + 4 + 8 + 10
    flops = 2 * 3 * 36 * 4 * 3 * 25 + 2 * 3 * 4 * 2
    counted = count(Supernet(), X, {"op": 1})
    assert (counted.parameters, counted.flops) == (parameters, flops)
    assert counted == count(prune(Supernet(), {"op": 1}, X), X)
