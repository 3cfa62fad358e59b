"""`nascompile.evaluate`: what comes in and out around the shared walk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nascompile
from nascompile.compiler.errors import ArchitectureError, NascompileError
from nascompile.fixed import FixedArchitecture
from tests.runtime.toys import CLASSES, FEATURES, Net

ARCHITECTURES: list[dict[str, Any]] = [
    {"cell.first": first, "LayerChoice1": second, "skip": skip, "switch": switch}
    for first, second, skip, switch in [
        (0, 0, [], 1),
        (0, 0, [], 0),
        (1, 2, [0], 1),
        (0, 1, [0], 1),
        (0, 0, [], 1),
    ]
]


def data(size: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (size,), generator=generator))


def loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch_size)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def by_hand(model: nn.Module, architecture: dict[str, Any], batches: Any = None) -> float:
    """The mean loss of all examples at once, or of `batches` by their sizes, of a copy."""
    clone = copy.deepcopy(model).eval()
    mutator = FixedArchitecture(clone, architecture)
    mutator.reset()
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for x, y in loader() if batches is None else batches:
            total += loss(clone(x), y).double() * len(x)
            count += len(x)
    mutator.release()
    return (total / count).item()


def test_means_of_a_number_in_the_order_given() -> None:
    model = Net().double().float()
    found = nascompile.evaluate(model, ARCHITECTURES, loader(), loss)
    assert found == [by_hand(model, architecture) for architecture in ARCHITECTURES]
    assert len(set(found)) == 4


def test_a_dict_of_values() -> None:
    def metrics(output: Tensor, target: Tensor) -> dict[str, Any]:
        return {"loss": loss(output, target), "right": (output.argmax(1) == target).double().mean().item()}

    model = Net()
    found = nascompile.evaluate(model, ARCHITECTURES, loader(), metrics)
    assert [one["loss"] for one in found] == nascompile.evaluate(model, ARCHITECTURES, loader(), loss)
    assert all(one["right"] * 10 == pytest.approx(round(one["right"] * 10)) for one in found)
    assert all(type(value) is float for one in found for value in one.values())


def test_architectures_from_files(tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(ARCHITECTURES[2]))
    model = Net()
    found = nascompile.evaluate(model, [path, str(path), ARCHITECTURES[2]], loader(), loss)
    assert found == [by_hand(model, ARCHITECTURES[2])] * 3


def test_batches_of_names() -> None:
    model = Net()
    batches = [{"x": x, "target": y} for x, y in loader()]
    assert nascompile.evaluate(model, ARCHITECTURES[:1], batches, loss) == [by_hand(model, ARCHITECTURES[0])]


def test_a_compiled_model_and_a_bound_mutator() -> None:
    model = Net()
    expected = [by_hand(model, architecture) for architecture in ARCHITECTURES]
    mutator = FixedArchitecture(model, ARCHITECTURES[1])
    mutator.reset()
    compiled = nascompile.compile(model, torch.randn(2, FEATURES))
    assert nascompile.evaluate(compiled, ARCHITECTURES, loader(), loss) == expected
    assert all(m.bound_mutator is mutator for m in mutator.undedup_mutables)
    assert mutator.sample_final() == mutator.decision


def test_modes_gradients_and_buffers_come_back() -> None:
    model = Net().train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    nascompile.evaluate(model, ARCHITECTURES, loader(), loss, recalibrate=loader())
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert frozen.momentum == 0.1


def test_modes_come_back_after_an_error() -> None:
    model = Net().train()

    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no metric")

    with pytest.raises(RuntimeError, match="no metric"):
        nascompile.evaluate(model, ARCHITECTURES, loader(), fails)
    assert all(module.training for module in model.modules())


def test_recalibration_changes_the_result_as_it_does_by_hand() -> None:
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            module.running_mean.fill_(3)
    clone = copy.deepcopy(model).eval()
    mutator = FixedArchitecture(clone, ARCHITECTURES[0])
    mutator.reset()
    norms = [module for module in clone.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x, _ in loader():
            clone(x)
    mutator.release()
    found = nascompile.evaluate(model, ARCHITECTURES[:1], loader(), loss, recalibrate=loader())
    assert found == [by_hand(clone, ARCHITECTURES[0])]
    assert found != [by_hand(model, ARCHITECTURES[0])]


def test_progress() -> None:
    seen: list[tuple[int, int | None]] = []
    nascompile.evaluate(Net(), ARCHITECTURES, loader(), loss, progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    nascompile.evaluate(
        Net(), ARCHITECTURES, (raw for raw in loader()), loss, progress=lambda *a: seen.append(a)
    )
    assert seen == [(1, None), (2, None), (3, None)]


def test_inference_mode() -> None:
    model = Net()
    with torch.inference_mode():
        found = nascompile.evaluate(model, ARCHITECTURES, loader(), loss)
    assert found == [by_hand(model, architecture) for architecture in ARCHITECTURES]


def test_no_architectures() -> None:
    assert nascompile.evaluate(Net(), [], loader(), loss) == []


def test_no_data() -> None:
    with pytest.raises(NascompileError, match="the loader has no batches"):
        nascompile.evaluate(Net(), ARCHITECTURES, [], loss)
    with pytest.raises(NascompileError, match="recalibrate has no batches"):
        nascompile.evaluate(Net(), ARCHITECTURES, loader(), loss, recalibrate=[])


def test_a_wrong_architecture_stops_everything_before_it_starts() -> None:
    def never(output: Tensor, target: Tensor) -> Tensor:
        raise AssertionError("something ran")

    wrong = {**ARCHITECTURES[0], "skip": "conv"}
    with pytest.raises(ArchitectureError, match="architecture 1: key 'skip': 'conv' is not a candidate"):
        nascompile.evaluate(Net(), [ARCHITECTURES[0], wrong], loader(), never)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_go_to_the_device_of_the_model() -> None:
    model = Net().cuda()
    found = nascompile.evaluate(model, ARCHITECTURES, loader(), loss, recalibrate=loader())
    expected = nascompile.evaluate(
        copy.deepcopy(model).cpu(), ARCHITECTURES, loader(), loss, recalibrate=loader()
    )
    assert found == pytest.approx(expected, rel=1e-4)
