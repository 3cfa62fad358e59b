"""`nascompile.evaluate`: what comes in and out around the shared walk."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

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
    used_up = iter(loader())
    list(used_up)
    empty = DataLoader(data(0), batch_size=4)
    for batches, problem in (
        ([], "the loader has no batches$"),
        (empty, "the loader has no batches$"),
        (used_up, "the loader has no batches; an iterator gives its batches once"),
        ([(torch.zeros(0, FEATURES), torch.zeros(0))], "the loader has no examples: 1 batches of size 0"),
    ):
        with pytest.raises(NascompileError, match=problem):
            nascompile.evaluate(Net(), ARCHITECTURES, batches, loss)
    with pytest.raises(NascompileError, match="recalibrate has no batches"):
        nascompile.evaluate(Net(), ARCHITECTURES, loader(), loss, recalibrate=[])


def test_a_batch_without_examples_counts_nothing() -> None:
    model = Net()
    batches = [*loader(), (torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.long))]
    assert nascompile.evaluate(model, ARCHITECTURES[:1], batches, loss) == [by_hand(model, ARCHITECTURES[0])]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            None,
            r"None \(NoneType\) for architecture 0 in batch 0, expected a number, a tensor of one, or a dict",
        ),
        ("0.5", r"'0.5' \(str\) for architecture 0"),
        (1j, r"1j \(complex\)"),
        ([0.5], r"\[0.5\] \(list\)"),
        (numpy.zeros(2), r"array\(\[0., 0.\]\) \(ndarray\)"),
        (numpy.str_("a"), r".*'a'\)? \(str_\)"),
        (torch.zeros(4), r"a tensor of shape \(4,\) and type torch.float32 for"),
        (torch.zeros((), dtype=torch.complex64), r"a tensor of shape \(\) and type torch.complex64 for"),
        ({}, r"\{\} \(dict\)"),
        ({"loss": 1.0, "right": None}, r"None \(NoneType\) under 'right' for architecture 0 in batch 0"),
    ],
)
def test_values_that_have_no_mean_are_refused(value: Any, problem: str) -> None:
    with pytest.raises(NascompileError, match=f"metric gives {problem}"):
        nascompile.evaluate(Net(), ARCHITECTURES, loader(), lambda output, target: value)


@pytest.mark.parametrize("value", [True, 2, numpy.float32(0.5), numpy.bool_(True), torch.ones(1)])
def test_values_of_all_kinds_of_numbers(value: Any) -> None:
    found = nascompile.evaluate(Net(), ARCHITECTURES, loader(), lambda output, target: value)
    assert found == [float(value)] * len(ARCHITECTURES)


def test_entries_that_come_and_go_are_refused() -> None:
    for values, problem in (
        (
            [{"a": 1}, {"a": 1, "b": 2}],
            "metric gives the entries 'a', 'b' for architecture .* expected the entries 'a'",
        ),
        ([{"a": 1}, 2], "metric gives a value without a name for .* expected the entries 'a' as before"),
    ):
        with pytest.raises(NascompileError, match=problem):
            nascompile.evaluate(Net(), ARCHITECTURES, loader(), lambda *_, v=values: v.pop(0))


X = torch.randn(2, FEATURES)


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (3, "batch 1: a batch is a int; expected a tensor, a dict, or"),
        ("abc", "batch 1: a batch is a str"),
        ((X,), "batch 1: a batch is a tuple of 1"),
        (torch.zeros(()), "batch 1: a batch is a Tensor without dimensions"),
        ({"x": X}, "batch 1: a batch has the entries 'x'; expected exactly one of target"),
        ((X, X, X, X), r"batch 1: 3 inputs and the target do not fit forward\(.*\): too many positional"),
    ],
)
@pytest.mark.parametrize("name", ["loader", "recalibrate"])
def test_what_is_no_batch_is_refused(batch: Any, problem: str, name: str) -> None:
    batches: dict[str, Any] = {"loader": loader(), name: [(X, torch.zeros(2, dtype=torch.long)), batch]}
    with pytest.raises(NascompileError, match=f"^{name}, {problem}"):
        nascompile.evaluate(Net(), ARCHITECTURES, metric=loss, **batches)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"loader": None}, "loader is a NoneType, expected an iterable of batches"),
        ({"loader": X}, "loader is a Tensor"),
        ({"loader": {"x": X}}, "loader is a dict"),
        ({"recalibrate": 3}, "recalibrate is a int"),
        ({"metric": None}, "metric is a NoneType, expected a function of output and target"),
        ({"architectures": ARCHITECTURES[0]}, "architectures is a dict, expected a list of files or dicts"),
        ({"architectures": "architecture.json"}, "architectures is a str"),
        ({"architectures": None}, "architectures is a NoneType"),
    ],
)
def test_other_arguments_are_refused(change: dict[str, Any], problem: str) -> None:
    arguments: dict[str, Any] = {"architectures": ARCHITECTURES, "loader": loader(), "metric": loss}
    with pytest.raises(NascompileError, match=f"^{problem}"):
        nascompile.evaluate(Net(), **{**arguments, **change})


class Stream(IterableDataset[Any]):
    """Examples whose number nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data())


def test_generators() -> None:
    model = Net()
    seen: list[Any] = []
    found = nascompile.evaluate(
        model,
        (one for one in ARCHITECTURES),
        DataLoader(Stream(), batch_size=4),
        loss,
        progress=lambda *at: seen.append(at),
    )
    assert found == [by_hand(model, architecture) for architecture in ARCHITECTURES]
    assert seen == [(1, None), (2, None), (3, None)]


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


def test_errors_of_a_metric_say_where() -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        # the last batch has two examples of ten
        if len(target) == 2:
            raise KeyError("no such thing")
        return loss(output, target)

    with pytest.raises(KeyError, match="no such thing") as raised:
        nascompile.evaluate(Net(), ARCHITECTURES, loader(), fails)
    assert raised.value.__notes__ == ["in the metric of architecture 0", "in batch 2 of the loader"]


def test_errors_of_the_model_name_the_batch() -> None:
    batches = [
        (torch.randn(2, FEATURES), torch.zeros(2).long()),
        (torch.randn(2, FEATURES + 1), torch.zeros(2)),
    ]
    with pytest.raises(RuntimeError) as raised:
        nascompile.evaluate(Net(), ARCHITECTURES, batches, loss)
    assert raised.value.__notes__[-1] == "in batch 1 of the loader"
